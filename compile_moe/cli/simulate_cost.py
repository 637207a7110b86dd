"""What a MoE layer costs with its experts on many ranks: kernels and links by formula, routings drawn at random."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compile_moe.cli.bench_results import Work
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.routing import draw_ids, log_popularities
from compile_moe.cli.timing import Ceilings
from compile_moe.cli.tune_inputs import Experts


class Links(NamedTuple):
    """node_size: ranks of a node. Bandwidths: bytes/s of a rank, in each direction, to its own node and to others.
    Latencies: seconds of an exchange inside a node, and of one that leaves it.
    """

    node_size: int
    node_bandwidth: float
    network_bandwidth: float
    node_latency: float
    network_latency: float


class Kernels(NamedTuple):
    """Time of one rank's experts: ``overhead`` + floor / share, in seconds.

    shares: (FLOPs a byte, floor / time without the overhead), ascending; between two of them logarithmically
    interpolated, beyond them the nearest.
    """

    ceilings: Ceilings
    overhead: float
    shares: tuple[tuple[float, float], ...]

    def seconds(self, work: Work) -> float:
        if not work.num_bytes:
            return self.overhead
        return self.overhead + work.floor(self.ceilings) * 1e-6 / self.share(work.flops / work.num_bytes)

    def share(self, intensity: float) -> float:
        position = bisect.bisect([at for at, _ in self.shares], intensity)
        if position in (0, len(self.shares)):
            return self.shares[min(position, len(self.shares) - 1)][1]
        (left, first), (right, second) = self.shares[position - 1 : position + 1]
        return first + (second - first) * math.log(intensity / left) / math.log(right / left)


class Layer(NamedTuple):
    """Seconds of one layer: of the slowest rank in each part, and the slots of the busiest rank over the mean."""

    num_ranks: int
    skew: float
    dispatch: float
    experts: float
    combine: float
    imbalance: float

    @property
    def seconds(self) -> float:
        return self.dispatch + self.experts + self.combine


def kernels_of_bench(path: Path) -> Kernels:
    """From what ``compile-moe bench --part experts --json`` wrote: our experts' times.

    Raises:
        Refusal: a file that is none of those, or has no times of our experts alone.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        ceilings = Ceilings(**found["ceilings"])
        measured = [
            (
                m["tokens"],
                m["floor"] * 1e-6,
                m["microseconds"] * 1e-6,
                m["work"]["flops"] / m["work"]["num_bytes"],
            )
            for m in found["measurements"]
            if m["contestant"] == "compile_moe" and m["microseconds"] is not None and m["floor"] is not None
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(
            f"--kernels {path} can't be read as a result of bench ({error!r}); make one by: compile-moe bench "
            "--part experts --json FILE"
        ) from error
    if not measured:
        raise Refusal(
            f"--kernels {path} has no times of the contestant compile_moe with --part experts; measure them, too"
        )
    return kernels_of_points(ceilings, measured)


def kernels_of_points(ceilings: Ceilings, measured: Sequence[tuple[int, float, float, float]]) -> Kernels:
    """From times of our experts: (tokens, floor in seconds, seconds, FLOPs a byte).

    The overhead is what the fewest tokens take beyond their floor: measure one token, too. No share is above 1.
    """
    _, floor, seconds, _ = min(measured)
    overhead = max(0.0, seconds - floor)
    shares = {
        intensity: min(1.0, floor / max(seconds - overhead, floor))
        for _, floor, seconds, intensity in sorted(measured, key=lambda point: point[3])
    }
    return Kernels(ceilings, overhead, tuple(shares.items()))


def check_ranks(num_ranks: int, num_experts: int) -> None:
    """Raise Refusal unless each rank has as many experts, or each expert as many ranks."""
    if num_ranks < 1:
        raise Refusal(f"--ranks must be at least 1, got {num_ranks}")
    if max(num_ranks, num_experts) % min(num_ranks, num_experts):
        raise Refusal(
            f"--ranks must divide the {num_experts} experts or be a multiple of them, got {num_ranks}"
        )


def simulate_layer(
    experts: Experts,
    num_ranks: int,
    tokens: int,
    skew: float,
    kernels: Kernels,
    links: Links,
    dispatched_bytes: float,
    combined_bytes: float,
    weight_bytes: float,
    seed: int,
    exchange: str = "all_to_all",
) -> Layer:
    """One layer of ``num_ranks`` ranks with ``tokens`` tokens each, none of whose parts overlap.

    Experts lie on the ranks in order; with more ranks than experts, each has as many copies, which take tokens in turn.
    By "all_to_all" a token travels once to each rank that has an expert of it, and one sum of each of them comes back;
    by "all_gather" to all ranks, which all have a sum.

    Args:
        skew: the r-th most popular expert is chosen as often as r ** -skew; which one that is, is random.
        dispatched_bytes: of a token on its way to one rank; combined_bytes: of a sum on its way back.
        weight_bytes: of one element of the experts' weights.
    """
    num_experts = experts.shape.num_experts
    check_ranks(num_ranks, num_experts)
    generator = torch.Generator().manual_seed(seed)
    popularity = log_popularities(num_experts, skew, generator)
    copies = max(1, num_ranks // num_experts)
    on_a_rank = max(1, num_experts // num_ranks)
    travelling = torch.zeros(num_ranks, num_ranks)  # tokens from a rank to another
    rows = torch.zeros(num_ranks * on_a_rank)  # of each expert of each rank
    for source in range(num_ranks):
        ids = draw_ids(popularity, tokens, experts.topk, generator)
        turn = (source * tokens + torch.arange(tokens)).unsqueeze(1) % copies
        place = ids * copies + turn
        rows += torch.bincount(place.flatten(), minlength=len(rows))
        target = torch.nn.functional.one_hot(place // on_a_rank, num_ranks).amax(1)
        travelling[source] = tokens if exchange == "all_gather" else target.sum(0)
    of_rank = rows.view(num_ranks, on_a_rank)
    works = [
        layer_work(
            experts,
            of_rank[rank],
            float(travelling[:, rank].sum()) * (dispatched_bytes + combined_bytes),
            weight_bytes,
        )
        for rank in range(num_ranks)
    ]
    return Layer(
        num_ranks,
        skew,
        _exchange(travelling * dispatched_bytes, links),
        max(kernels.seconds(work) for work in works),
        _exchange(travelling.t() * combined_bytes, links),
        float(of_rank.sum(1).amax() / of_rank.sum(1).mean()) if tokens else 1.0,
    )


def layer_work(experts: Experts, rows: Tensor, token_bytes: float, weight_bytes: float) -> Work:
    """Of experts with these numbers of rows, whose tokens and results have ``token_bytes`` together."""
    _, hidden_size, intermediate_size = experts.shape
    elements = (2 if experts.layout == "ungated" else 3) * hidden_size * intermediate_size
    weights = float((rows > 0).sum()) * elements * weight_bytes
    return Work(int(2 * rows.sum()) * elements, weights + token_bytes)


def _exchange(sent: Tensor, links: Links) -> float:
    """Seconds in which every rank (rows) has sent these bytes to every rank (columns)."""
    num_ranks = len(sent)
    if num_ranks == 1:
        return 0.0
    node = torch.arange(num_ranks) // links.node_size
    is_near = node.unsqueeze(1) == node.unsqueeze(0)
    is_near_but_other = is_near & ~torch.eye(num_ranks, dtype=torch.bool)
    near, far = sent * is_near_but_other, sent * ~is_near
    seconds = max(_busiest(near) / links.node_bandwidth, _busiest(far) / links.network_bandwidth)
    return seconds + (links.node_latency if num_ranks <= links.node_size else links.network_latency)


def _busiest(sent: Tensor) -> float:
    """Bytes of the rank that sends or receives most."""
    return float(torch.maximum(sent.sum(0), sent.sum(1)).amax())
