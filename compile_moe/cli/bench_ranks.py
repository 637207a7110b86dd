"""``compile-moe bench-ranks``: a MoE layer whose experts lie on the ranks that torchrun started, part by part."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from compile_moe import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedTritonExperts,
    ExpertPlacement,
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    PrepareResult,
    TritonExperts,
)
from compile_moe.cli.bench_ranks_results import RanksMeasurement, RanksResults, as_json, table
from compile_moe.cli.language_model import choose_dtype
from compile_moe.cli.measurement import MOST_ERROR
from compile_moe.cli.rank_timing import (
    Ranks,
    all_gather,
    all_to_all,
    busiest_bytes,
    joined,
    measure_links,
    reduce_scatter,
    seconds_together,
    slowest,
)
from compile_moe.cli.refusal import Refusal, write_whole, writing
from compile_moe.cli.routing import draw_ids, log_popularities
from compile_moe.cli.simulate import EXCHANGES, SLOT_BYTES, named_experts
from compile_moe.cli.simulate_cost import Kernels, Links, kernels_of_points, layer_work, simulate_layer
from compile_moe.cli.timing import measure_ceilings
from compile_moe.cli.tune_inputs import ACTIVATIONS, Experts, make_weights

DISPATCHES = ("all_to_all", "all_gather", "batched")
#: Inputs of each number of tokens, with other routing.
_BATCHES = 4


@dataclass(frozen=True)
class BenchRanksOptions:
    """What the command line gives. sizes: K, I, E and topk, in place of a model. tokens: of each rank."""

    model: str | None = None
    sizes: tuple[int, int, int, int] | None = None
    tokens: tuple[int, ...] = (1, 64, 1024)
    dispatches: tuple[str, ...] = DISPATCHES
    dtype: str | None = None
    skew: float = 0.0
    json: Path | None = None
    seed: int = 0
    compiled: bool = True


def run_bench_ranks(options: BenchRanksOptions) -> None:
    """Measure on all ranks, and print the table on the first.

    Raises:
        Refusal: options that can't work, or a process that torchrun did not start.
    """
    for dispatch in options.dispatches:
        if dispatch not in DISPATCHES:
            raise Refusal(f"--dispatch must be of {', '.join(DISPATCHES)}, got {dispatch}")
    for tokens in options.tokens:
        if tokens < 1:
            raise Refusal(f"--tokens must be at least 1, got {tokens}")
    if not options.skew >= 0:
        raise Refusal(f"--skew must not be negative, got {options.skew:g}")
    name, experts = named_experts(options.model, options.sizes)
    if options.json is not None:  # refused before the work is done
        with writing("--json", options.json):
            options.json.open("a").close()
    # A compilation for each exchange and, where batches have other capacities, number of tokens.
    limit = torch._dynamo.config.patch(recompile_limit=1000)
    with joined("bench-ranks") as ranks, torch.no_grad(), limit:
        if experts.shape.num_experts % ranks.size:
            raise Refusal(f"the ranks, {ranks.size}, must divide the {experts.shape.num_experts} experts")
        results = measure_ranks(name, experts, options, ranks)
        if ranks.rank > 0:
            return
    Console(width=None if Console().is_terminal else 130).print(table(results))
    if options.json is not None:
        with writing("--json", options.json):
            write_whole(options.json, json.dumps(as_json(results), indent=1) + "\n")


def measure_ranks(name: str, experts: Experts, options: BenchRanksOptions, ranks: Ranks) -> RanksResults:
    """All dispatches at all numbers of tokens."""
    dtype = choose_dtype(options.dtype, ranks.device)
    torch.manual_seed(options.seed)
    # The same on all ranks, for the comparison with a rank that has all experts.
    weights = [make_weights(experts, gemm, dtype, ranks.device) for gemm in ("gather_gemm", "scatter_gemm")]
    bench = _RanksBench(experts, [w for pair in weights for w in pair], ranks, options)
    latency, bandwidth = measure_links(ranks)
    # One token, too: what it takes beyond its floor is overhead.
    kernels = bench.kernels(dict.fromkeys((1, *options.tokens)), dtype)
    links = Links(ranks.size, bandwidth, bandwidth, latency, latency)
    measurements = [
        bench.measure(dispatch, tokens, kernels, links)
        for tokens in options.tokens
        for dispatch in options.dispatches
    ]
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "CPU"
    backend = str(dist.get_backend())
    return RanksResults(
        device,
        ranks.size,
        backend,
        name,
        str(dtype).removeprefix("torch."),
        latency,
        bandwidth,
        options.compiled,
        measurements,
    )


class _Layer(NamedTuple):
    """Functions of tokens, weights and ids: the whole, what prepare does, and that with finalize of some results."""

    whole: Callable[..., Tensor]
    there: Callable[..., PrepareResult]
    there_and_back: Callable[..., Tensor]


class _RanksBench:
    """A layer's weights, whole and this rank's, and its tokens."""

    def __init__(
        self, experts: Experts, weights: list[Tensor | None], ranks: Ranks, options: BenchRanksOptions
    ) -> None:
        self.experts, self.ranks, self.options = experts, ranks, options
        self.w1, self.w1_bias, self.w2, self.w2_bias = weights
        self.placement = ExpertPlacement.linear(experts.shape.num_experts, ranks.size)
        local = self.placement.local_experts[ranks.rank]
        self.own = slice(local[0], local[-1] + 1)
        self.activation = ACTIVATIONS[experts.layout]
        self.whole = self.compiled(self._whole_layer())
        # One for all numbers of tokens, where they can have it.
        self.layer_of = functools.cache(self._layer)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True) if self.options.compiled else function

    def _whole_layer(self) -> Callable[..., Tensor]:
        kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), TritonExperts(self.w1_bias, self.w2_bias))

        def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            return kernel(x, self.w1, self.w2, weights, ids, activation=self.activation)

        return layer

    def _layer(self, dispatch: str, capacity: int) -> _Layer:
        """capacity: of batches, for each rank's slots of an expert."""
        parts: Any
        experts: Any = TritonExperts
        device, num_experts = self.ranks.device, self.placement.num_experts
        if dispatch == "all_gather":
            parts = AllGatherPrepareAndFinalize(self.placement, device=device, num_tokens="equal")
        elif dispatch == "all_to_all":
            parts = AllToAllPrepareAndFinalize(self.placement, device=device)
        else:
            parts = BatchedAllToAllPrepareAndFinalize(self.placement, capacity, device=device)
            experts = functools.partial(BatchedTritonExperts, parts.max_num_tokens)
        topk = self.experts.topk
        num_local = self.own.stop - self.own.start
        w1, w2 = self.w1[self.own], self.w2[self.own]  # type: ignore[index]
        w1_bias, w2_bias = (b if b is None else b[self.own] for b in (self.w1_bias, self.w2_bias))
        kernel = FusedMoEModularKernel(parts, experts(w1_bias, w2_bias))
        options: dict[str, Any] = {"activation": self.activation, "expert_map": parts.expert_map}

        def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            return kernel(x, w1, w2, weights, ids, **options)

        def there(x: Tensor, weights: Tensor, ids: Tensor) -> PrepareResult:
            return parts.prepare(x, None, None, weights, ids, num_experts, parts.expert_map, False)

        def there_and_back(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            rows = there(x, weights, ids)
            routing = (weights, ids) if dispatch == "batched" else (rows.topk_weights, rows.topk_ids)
            second = rows.hidden_states.size(1) if dispatch == "batched" else topk
            # Of any value.
            results = x.new_empty(rows.hidden_states.size(0), second, x.size(1))
            return parts.reduce(results, *routing, parts.expert_map, num_local, False)

        return _Layer(self.compiled(layer), self.compiled(there), self.compiled(there_and_back))

    def tokens(self, tokens: int, rank: int | None = None, batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states, topk_weights and topk_ids of a rank, in one of several batches."""
        rank = self.ranks.rank if rank is None else rank
        popular = torch.Generator().manual_seed(self.options.seed)
        num_experts, hidden_size, _ = self.experts.shape
        popularity = log_popularities(num_experts, self.options.skew, popular)
        generator = torch.Generator().manual_seed((self.options.seed * _BATCHES + batch) * 1000 + rank + 1)
        ids = draw_ids(popularity, tokens, self.experts.topk, generator)
        x = torch.randn(tokens, hidden_size, generator=generator)
        weights = torch.rand(tokens, self.experts.topk, generator=generator).softmax(-1)
        device = self.ranks.device
        made = x.to(device, self.w1.dtype), weights.to(device), ids.to(device)  # type: ignore[union-attr]
        if self.options.compiled and tokens > 1:
            for t in made:
                torch._dynamo.mark_dynamic(t, 0)
        return made

    def alone(self, tokens: int) -> list[Callable[[], Tensor]]:
        """Layers that have all experts, on several batches, so that no cache holds the weights."""
        return [functools.partial(self.whole, *self.tokens(tokens, batch=i)) for i in range(_BATCHES)]

    def kernels(self, numbers: Iterable[int], dtype: torch.dtype) -> Kernels:
        """Their times as ``compile-moe simulate`` wants them, by this rank's routing and ceilings."""
        ceilings = measure_ceilings(self.ranks.device, dtype)
        points = []
        for tokens in numbers:
            seconds = seconds_together(self.alone(tokens), self.ranks, self.ranks.device.type == "cuda")
            ids = self.tokens(tokens)[2]
            counts = torch.bincount(ids.flatten().cpu(), minlength=self.experts.shape.num_experts)
            row_bytes = 2.0 * self.experts.shape.hidden_size * dtype.itemsize
            work = layer_work(self.experts, counts, tokens * row_bytes, dtype.itemsize)
            points.append((tokens, work.floor(ceilings) * 1e-6, seconds, work.flops / work.num_bytes))
        return kernels_of_points(ceilings, points)

    def rows(self, tokens: int) -> Tensor:
        """(ranks, ranks): tokens with experts on a rank (columns) of those that a rank (rows) has."""
        per_rank = self.experts.shape.num_experts // self.ranks.size
        rows = []
        for rank in range(self.ranks.size):
            target = self.tokens(tokens, rank)[2].cpu() // per_rank
            rows.append(torch.nn.functional.one_hot(target, self.ranks.size).amax(1).sum(0))
        return torch.stack(rows)

    def most_slots(self, tokens: int) -> int:
        """That a rank has for one expert: with so much room nothing is dropped."""
        places = itertools.product(range(self.ranks.size), range(_BATCHES))
        ids = [self.tokens(tokens, rank, batch)[2].flatten().cpu() for rank, batch in places]
        return max(int(torch.bincount(each).max()) for each in ids)

    def measure(self, dispatch: str, tokens: int, kernels: Kernels, links: Links) -> RanksMeasurement:
        device, size = self.ranks.device, self.ranks.size
        capacity = self.most_slots(tokens) if dispatch == "batched" else 0
        if dispatch == "all_gather":
            num_sent = torch.full((size, size), tokens)
        elif dispatch == "all_to_all":
            num_sent = self.rows(tokens)
        else:
            num_sent = torch.full((size, size), capacity * (self.own.stop - self.own.start))
        layer, there, there_and_back = self.layer_of(dispatch, capacity)
        batches = [self.tokens(tokens, batch=i) for i in range(_BATCHES)]
        layers = [functools.partial(layer, *batch) for batch in batches]
        alone = self.alone(tokens)
        errors = []
        for call, whole in zip(layers, alone, strict=True):
            expected = whole().float()
            errors.append(((call().float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        # Of all ranks, so that all of them go on, or none.
        (error,) = slowest([float(torch.stack(errors).max())], self.ranks)
        x = batches[0][0]
        if not error <= MOST_ERROR[x.dtype]:
            raise RuntimeError(f"{dispatch}, {tokens} tokens: wrong result, by {error:.1e}")
        prepare = functools.partial(there, *batches[0])
        both_ways = functools.partial(there_and_back, *batches[0])

        graph = dispatch != "all_to_all" and device.type == "cuda"
        eager = seconds_together(layers, self.ranks)
        replayed = seconds_together(layers, self.ranks, True) if graph else None
        dispatched = seconds_together([prepare] * _BATCHES, self.ranks, graph)
        both = seconds_together([both_ways] * _BATCHES, self.ranks, graph)
        row_bytes = x.size(1) * x.element_size()
        sent_bytes = row_bytes + (0 if dispatch == "batched" else self.experts.topk * SLOT_BYTES)
        if dispatch == "all_gather":
            raw = all_gather(tokens, sent_bytes, self.ranks), reduce_scatter(tokens, x, self.ranks)
        else:
            raw = (
                all_to_all(num_sent, sent_bytes, self.ranks),
                all_to_all(num_sent.t(), row_bytes, self.ranks),
            )
        raw_there, raw_back = (seconds_together([call] * _BATCHES, self.ranks, graph) for call in raw)
        simulated = None
        if dispatch in EXCHANGES:
            costs = self.options.skew, kernels, links, sent_bytes, row_bytes, x.element_size()
            simulated = simulate_layer(
                self.experts, size, tokens, *costs, self.options.seed, dispatch
            ).seconds
        return RanksMeasurement(
            dispatch,
            tokens,
            seconds_together(alone, self.ranks, graph),
            eager,
            replayed,
            dispatched,
            max(both - dispatched, 0.0),
            raw_there,
            raw_back,
            busiest_bytes(num_sent, sent_bytes),
            busiest_bytes(num_sent.t(), row_bytes),
            simulated,
            error,
        )
