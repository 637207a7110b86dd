"""What ``compile-moe bench`` found: records, their JSON, and the tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

import compile_moe.integrations.transformers as integration
from compile_moe.cli.timing import Ceilings, quantizes_tokens


class Work(NamedTuple):
    """What the experts must do at least: FLOPs of their products, and bytes of the weights of the experts that are
    hit and of the tokens in and out.
    """

    flops: int
    num_bytes: float

    def floor(self, ceilings: Ceilings) -> float:
        """Microseconds that the arithmetic or the bytes need."""
        return max(self.flops / ceilings.flops, self.num_bytes / ceilings.bandwidth) * 1e6


class Measurement(NamedTuple):
    """One contestant at one number of experts and of tokens.

    microseconds: of one call. replayed: as a CUDA graph; otherwise the host launches it. host: microseconds until a
    call that is not replayed returns. kernels: of one call, by name. memory: bytes allocated at the peak over weights,
    input and output. error: relative, against the contestant's reference. work, floor: of the experts; floor in
    microseconds, by the ceilings of this run; None for a block. failure: why there are no numbers, or "". What only a
    GPU has is None on a CPU; num_experts, where not even the layer could be made.
    """

    contestant: str
    num_experts: int | None
    tokens: int
    microseconds: float | None = None
    replayed: bool = False
    host: float | None = None
    kernels: tuple[str, ...] | None = None
    memory: int | None = None
    error: float | None = None
    work: Work | None = None
    floor: float | None = None
    failure: str = ""


class HostTime(NamedTuple):
    """Microseconds of the host for an eager call of :func:`compile_moe.fused_experts`, and for launching the same
    compiled kernels with the same arguments; None, and why in ``failure``, where they could not be measured.
    """

    num_experts: int
    tokens: int
    call: float | None = None
    launches: float | None = None
    kernels: tuple[str, ...] = ()
    failure: str = ""

    @property
    def ratio(self) -> float | None:
        return self.call / self.launches if self.call and self.launches else None


class Results(NamedTuple):
    """All measurements of a run, and where they were taken. complete: the run was not interrupted."""

    device: str
    versions: dict[str, str]
    model: str
    part: str
    dtype: str
    ceilings: Ceilings
    measurements: tuple[Measurement, ...] = ()
    host: tuple[HostTime, ...] = ()
    complete: bool = True


def as_json(results: Results) -> dict[str, Any]:
    return {
        **results._asdict(),
        "ceilings": results.ceilings._asdict(),
        "measurements": [
            {**m._asdict(), "work": None if m.work is None else m.work._asdict()}
            for m in results.measurements
        ],
        "host": [{**h._asdict(), "ratio": h.ratio} for h in results.host],
    }


def describe(m: Measurement) -> str:
    """One line."""
    experts = "" if m.num_experts is None else f", E {m.num_experts}"
    found = m.failure if m.microseconds is None else f"{m.microseconds:.1f} µs"
    return f"{m.contestant}{experts}, {m.tokens} tokens: {found}"


def title(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return f"{results.model}, {results.part}, {results.dtype}; {results.device}, {versions}"


def tables(results: Results) -> Iterator[Table]:
    """The measurements, and the host times where they were asked for."""
    is_sweep = len({m.num_experts for m in results.measurements}) > 1
    flops, bandwidth, scheme_flops = results.ceilings
    rates = [("", flops), *((f" as {scheme}", rate) for scheme, rate in scheme_flops.items())]
    products = ", ".join(f"matrix product{which} {rate / 1e12:.1f} TFLOP/s" for which, rate in rates)
    notes = [f"In the same run: {products}, copy {bandwidth / 1e12:.3f} TB/s."]
    without = [
        name
        for name in dict.fromkeys(m.contestant for m in results.measurements)
        if quantizes_tokens(name) and name not in scheme_flops
    ]
    if without:
        notes.append(
            f"No product of 8-bit operands was measured here: floor of {', '.join(without)} by the first one."
        )
    if not results.complete:
        notes.append("Interrupted: what there was until then.")
    if any(m.memory is not None for m in results.measurements):
        notes.append("MiB: peak over weights, input and output.")
    if _has_both(results):
        notes.append("*: launched by the host, the others replayed as a CUDA graph.")
    # A row holds the first clause of a failure; the whole of it follows once.
    notes += dict.fromkeys(f"{m.contestant}: {m.failure}" for m in results.measurements if "; " in m.failure)
    # As text: a folder's name may hold what rich takes for markup.
    table = Table(title=Text(title(results)), caption=Text("\n".join(notes)))
    columns = ("tokens", "experts", "µs", "times ours", "floor / time", "host µs", "kernels", "MiB")
    for column in ("E", *columns) if is_sweep else columns:
        table.add_column(column, justify="left" if column == "experts" else "right")
    for row in _rows(results):
        table.add_row(*(row if is_sweep else row[1:]))
    yield table
    if results.host:
        yield _host_table(results)


def _rows(results: Results) -> Iterator[tuple[str, ...]]:
    ours = {
        (m.num_experts, m.tokens): m.microseconds
        for m in results.measurements
        if m.contestant == integration.NAME
    }
    marks = _has_both(results)
    for m in sorted(results.measurements, key=lambda m: (m.num_experts or 0, m.tokens)):
        heading = str(m.num_experts), str(m.tokens), m.contestant
        if m.microseconds is None:
            yield (*heading, m.failure.partition("; ")[0], "", "", "", "", "")
            continue
        first = ours.get((m.num_experts, m.tokens))
        yield (
            *heading,
            f"{m.microseconds:.1f}{'*' if marks and not m.replayed else ''}",
            "" if first is None else f"{m.microseconds / first:.2f}",
            "" if m.floor is None else f"{m.floor / m.microseconds:.2f}",
            "" if m.host is None else f"{m.host:.0f}",
            "" if m.kernels is None else str(len(m.kernels)),
            "" if m.memory is None else f"{m.memory / 2**20:.1f}",
        )


def _has_both(results: Results) -> bool:
    return len({m.replayed for m in results.measurements if m.microseconds is not None}) > 1


def _host_table(results: Results) -> Table:
    table = Table(
        title="Host time of an eager call of compile_moe.fused_experts",
        caption="Launches: the call's compiled kernels, launched one by one with the call's arguments.",
    )
    for column in ("E", "tokens", "call µs", "launches µs", "kernels", "ratio"):
        table.add_column(column, justify="right")
    for h in results.host:
        if h.failure:
            numbers = h.failure, "", "", ""
        else:
            numbers = f"{h.call:.1f}", f"{h.launches:.1f}", str(len(h.kernels)), f"{h.ratio:.2f}"
        table.add_row(str(h.num_experts), str(h.tokens), *numbers)
    return table
