"""What ``compile-moe bench-ranks`` found: records, their JSON, and the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text


class RanksMeasurement(NamedTuple):
    """Seconds of one call on all ranks, each of which has ``tokens`` tokens.

    alone: each rank has all experts; launched as ``layer``. layer: with the experts on the ranks; eager, replayed:
    launched by the host, and as a CUDA graph (None where the host waits, or there is none). dispatch: there, with all
    that belongs to it; combine: what there and back takes longer. raw_dispatch, raw_combine: the backend's own exchange
    of the same kind and bytes. Bytes: of the busiest rank, to or from others. simulated: what ``compile-moe simulate``
    says of the layer, from this rank's kernels, launched by nobody, and the links. error: relative, of the worst token
    of all ranks, against ``alone``.
    """

    dispatch_by: str
    tokens: int
    alone: float
    eager: float
    replayed: float | None
    dispatch: float
    combine: float
    raw_dispatch: float
    raw_combine: float
    dispatch_bytes: int
    combine_bytes: int
    simulated: float | None
    error: float

    @property
    def layer(self) -> float:
        return self.eager if self.replayed is None else self.replayed


class RanksResults(NamedTuple):
    """latency, bandwidth: of the links, measured by the backend's own all-to-all."""

    device: str
    num_ranks: int
    backend: str
    model: str
    dtype: str
    latency: float
    bandwidth: float
    compiled: bool
    measurements: list[RanksMeasurement]


def as_json(results: RanksResults) -> dict[str, Any]:
    return {**results._asdict(), "measurements": [m._asdict() for m in results.measurements]}


def table(results: RanksResults) -> Table:
    result = Table(
        title=Text(
            f"{results.model}, {results.dtype}, experts on {results.num_ranks} ranks ({results.backend}); "
            f"{results.device}, torch {torch.__version__}"
        ),
        caption=Text(
            f"µs of the slowest rank, {'compiled' if results.compiled else 'not compiled'}. alone: all experts on "
            "each rank. batched: with room for the most slots that a "
            "rank has for an expert. dispatch: there, with sorting, packing and waiting; combine: the way back. raw: "
            "the backend's own exchange of the same kind and bytes. GB/s: bytes of the busiest rank, to or from "
            "others, by those times. simulated: from kernels alone, without launches, and the links: "
            f"{results.latency * 1e6:.1f} µs, {results.bandwidth / 1e9:.1f} GB/s a rank. tokens/s: of all ranks."
            + (
                " *: launched by the host, alone too; others replayed as CUDA graphs."
                if results.backend == "nccl"
                else ""
            )
        ),
    )
    for column in (
        "tokens",
        "by",
        "alone",
        "layer",
        "simulated",
        "tokens/s",
        "alone / layer",
        "dispatch",
        "raw",
        "GB/s",
        "combine",
        "raw",
        "GB/s",
    ):
        is_name = column == "by"
        result.add_column(column, justify="left" if is_name else "right", no_wrap=is_name)
    for row in _rows(results):
        result.add_row(*row)
    return result


def _rows(results: RanksResults) -> Iterator[tuple[str, ...]]:
    for m in results.measurements:
        star = "*" if m.replayed is None and results.backend == "nccl" else ""
        yield (
            str(m.tokens),
            m.dispatch_by,
            f"{m.alone * 1e6:.1f}",
            f"{m.layer * 1e6:.1f}{star}",
            "" if m.simulated is None else f"{m.simulated * 1e6:.1f}",
            f"{results.num_ranks * m.tokens / m.layer:.0f}",
            f"{m.alone / m.layer:.2f}",
            f"{m.dispatch * 1e6:.1f}",
            f"{m.raw_dispatch * 1e6:.1f}",
            _rate(m.dispatch_bytes, m.dispatch),
            f"{m.combine * 1e6:.1f}",
            f"{m.raw_combine * 1e6:.1f}",
            _rate(m.combine_bytes, m.combine),
        )


def _rate(num_bytes: int, seconds: float) -> str:
    """GB/s; "-" where the difference of two times gives none."""
    return f"{num_bytes / seconds / 1e9:.1f}" if seconds > 0 else "-"
