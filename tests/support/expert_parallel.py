"""Layers over the ranks of a group, compared with one rank's: the cases, and how a rank runs one.

Every rank makes the whole layer from the same seed and computes the tokens that are its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from compile_moe import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedTorchExperts,
    BatchedTritonExperts,
    ExpertPlacement,
    FusedMoEModularKernel,
    TorchExperts,
    TritonExperts,
)
from compile_moe.ops import batch_tokens
from compile_moe.prepare_finalize import batched_all_to_all
from tests.support.batched import poison, poisoning
from tests.support.oracle import Layer, assert_as_accurate, make_layer
from tests.support.quantized import Quantized, Variant, make_quantized
from tests.support.quantized import assert_as_accurate as assert_quantized_as_accurate

E = 6


def own_finalize(base: type[Any]) -> type[Any]:
    class OwnFinalize(base):  # type: ignore[misc]
        """A finalize of the user's own around ours, as the published interface calls it."""

        def finalize(self, output: Tensor, *arguments: Any) -> None:
            result = torch.empty_like(output)
            super().finalize(result, *arguments)
            output.copy_(result)

    return OwnFinalize


class OwnExperts(TritonExperts):
    """Experts of the user's own, which hand over all slots, skipped ones as zeros."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().apply(*args, **kwargs)


PARTS: dict[str, Callable[..., Any]] = {
    "all_to_all": AllToAllPrepareAndFinalize,
    "all_gather": AllGatherPrepareAndFinalize,
    "all_gather_at_most_9": lambda *args, **kwargs: AllGatherPrepareAndFinalize(
        *args, **kwargs, num_tokens=9
    ),
    "all_gather_equal": lambda *args, **kwargs: AllGatherPrepareAndFinalize(
        *args, **kwargs, num_tokens="equal"
    ),
    "batched_all_to_all": BatchedAllToAllPrepareAndFinalize,
}
OWN_FINALIZE = {
    "own_finalize": own_finalize(AllToAllPrepareAndFinalize),
    "batched_own_finalize": own_finalize(BatchedAllToAllPrepareAndFinalize),
}
#: What takes the place of experts where the parts batch tokens.
BATCHED = {
    TritonExperts: BatchedTritonExperts,
    TorchExperts: BatchedTorchExperts,
    OwnExperts: poisoning(BatchedTritonExperts),
}
#: Tokens of each of up to four ranks.
NUM_TOKENS: dict[str, list[int]] = {
    "even": [5] * 4,
    "uneven": [9, 0, 4, 1],
    "none": [0] * 4,
    "one": [1, 0, 0, 0],
}
#: Arguments of ``make_layer``.
LAYERS: dict[str, dict[str, Any]] = {
    "all-on-one": {"routing": "one"},
    "empty-experts": {"routing": "empty"},
    "duplicates": {"routing": "duplicate", "topk": 3},
    "skipped": {"skipped": True, "topk": 3},
    "biased": {"biased": True, "ids_dtype": torch.int32},
    "topk1-on-input": {"topk": 1, "apply_router_weight_on_input": True},
    "topk5": {"topk": 5},
    "strided": {"strided": True},
    "bfloat16": {"dtype": torch.bfloat16, "weights_dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64, "weights_dtype": torch.float64},
    "float64-topk3": {"dtype": torch.float64, "weights_dtype": torch.float64, "topk": 3},
}
VARIANTS = {
    "fp8_w8a8_channel": Variant("fp8_w8a8_channel"),
    "fp8_w8a8_block": Variant("fp8_w8a8_block", (("block_shape", (16, 24)),)),
    "fp8_w8a8_tensor": Variant("fp8_w8a8_tensor"),
    "int4_w4a16": Variant("int4_w4a16", (("group_size", 16),)),
}


def placements(num_ranks: int) -> dict[str, ExpertPlacement]:
    backwards = list(range(E))[::-1]
    sizes = {2: [5, 1], 4: [3, 1, 1, 1]}[num_ranks]
    explicit = [[backwards.pop() for _ in range(size)][::-1] for size in sizes]
    linear = ExpertPlacement.linear(E, num_ranks)
    return {
        "linear": linear,
        "round_robin": ExpertPlacement.round_robin(E, num_ranks),
        "explicit": ExpertPlacement(E, explicit),
        "replicated": linear.with_copies({0: range(1, num_ranks), E - 1: [0]}),
    }


@dataclass(frozen=True)
class Case:
    parts: str = "all_to_all"
    placement: str = "round_robin"
    num_tokens: str = "uneven"
    layer: dict[str, Any] = field(default_factory=dict)
    experts: type[Any] = TritonExperts
    variant: str = ""
    backend: str = ""
    inplace: bool = False
    device: str = "cpu"
    #: Of batched parts; as it is, nothing is dropped.
    max_tokens_per_rank: int = 45

    @property
    def is_batched(self) -> bool:
        return self.parts.startswith("batched")


def cases() -> Iterator[tuple[str, Case]]:
    """By readable name; each takes some 10 ms."""
    for parts in PARTS:
        tokens = "even" if parts == "all_gather_equal" else "uneven"
        for placement in ("linear", "round_robin", "explicit", "replicated"):
            for num_tokens in ("even", "none") if tokens == "even" else NUM_TOKENS:
                yield f"{parts}-{placement}-{num_tokens}", Case(parts, placement, num_tokens)
        for name, layer in LAYERS.items():
            yield f"{parts}-{name}", Case(parts, "replicated", tokens, layer)
        if tokens == "uneven":
            yield f"{parts}-float64-topk3-one", Case(parts, "linear", "one", LAYERS["float64-topk3"])
        for variant in VARIANTS:
            for experts in (TritonExperts, TorchExperts):
                yield (
                    f"{parts}-{variant}-{experts.__name__}",
                    Case(parts, "replicated", tokens, {"skipped": True}, experts, variant),
                )
        on_input = LAYERS["topk1-on-input"]
        yield (
            f"{parts}-fp8_w8a8_channel-on-input",
            Case(parts, num_tokens=tokens, layer=on_input, variant="fp8_w8a8_channel"),
        )
        skipped = Case(parts, "replicated", tokens, {"skipped": True})
        yield f"{parts}-in-place", replace(skipped, inplace=True)
        yield f"{parts}-own-experts", replace(skipped, experts=OwnExperts)
    # Through dynamo and AOTAutograd: seconds.
    compiled = Case("all_to_all", "replicated", layer={"skipped": True}, backend="aot_eager")
    yield "all_to_all-fp8_w8a8_channel-aot_eager", replace(compiled, variant="fp8_w8a8_channel")
    for parts in OWN_FINALIZE:
        for experts in (TritonExperts, OwnExperts):
            for inplace in (False, True):
                yield (
                    f"{parts}-{experts.__name__}{'-in-place' * inplace}",
                    Case(parts, layer={"skipped": True}, experts=experts, inplace=inplace),
                )
    yield from _over_capacity()


def _over_capacity() -> Iterator[tuple[str, Case]]:
    for room in (1, 3):
        for placement in ("explicit", "replicated"):
            case = Case("batched_all_to_all", placement, max_tokens_per_rank=room)
            for name in ("all-on-one", "duplicates", "skipped", "biased", "topk5", "topk1-on-input"):
                yield f"over-{room}-{placement}-{name}", replace(case, layer=LAYERS[name])
            for variant in VARIANTS:
                yield f"over-{room}-{placement}-{variant}", replace(case, variant=variant)
            yield f"over-{room}-{placement}-own-experts", replace(case, experts=OwnExperts)


@dataclass
class Shard:
    """A rank's part of a layer: its tokens, its weights, and how its result is judged.

    num_dropped: of each expert, where tokens are batched; the ids of those slots in ``tokens`` are negative.
    """

    tokens: Layer | Quantized
    num_dropped: list[int] | None
    kernel: FusedMoEModularKernel
    args: tuple[Tensor, ...]
    options: dict[str, Any]

    def check(self, result: Tensor) -> None:
        if self.num_dropped is not None:
            counted = self.kernel.prepare_finalize.num_dropped
            assert counted.dtype is torch.int32 and counted.tolist() == self.num_dropped
        if result.dtype is torch.float64:
            torch.testing.assert_close(result, self.tokens.reference(), rtol=1e-13, atol=1e-13)
        elif isinstance(self.tokens, Layer):
            assert_as_accurate(result, self.tokens)
        else:
            # One scale for all tokens is one for each rank's.
            one_scale = self.tokens.variant.scheme == "fp8_w8a8_tensor"
            assert_quantized_as_accurate(result, self.tokens, same_scales=not one_scale)


def kept(layer: Layer, placement: ExpertPlacement, rank: int, room: int) -> tuple[Layer, list[int]]:
    """What a capacity leaves of a rank's tokens, slot by slot from the contract, and how many each expert lost."""
    counts: dict[tuple[int, int], int] = {}
    dropped = [0] * placement.num_experts
    ids = layer.topk_ids.tolist()
    for token, chosen in enumerate(ids):
        for j, expert in enumerate(chosen):
            ranks = [r for r, local in enumerate(placement.local_experts) if expert in local]
            if not ranks:
                continue
            copy = expert, ranks[(token + rank) % len(ranks)]
            counts[copy] = counts.get(copy, 0) + 1
            if counts[copy] > room:
                dropped[expert] += 1
                chosen[j] = -1
    remaining = torch.tensor(ids, dtype=layer.topk_ids.dtype, device=layer.topk_ids.device)
    remaining = remaining.view(layer.topk_ids.shape)
    return replace(layer, topk_ids=remaining), dropped


def make_shard(
    case: Case, rank: int, num_ranks: int, num_tokens: list[int] | None = None, parts: Any = None
) -> Shard:
    """This rank's part of a case; ``parts`` of an earlier one can be used again."""
    placement = placements(num_ranks)[case.placement]
    counts = (num_tokens or NUM_TOKENS[case.num_tokens])[:num_ranks]
    options = {"M": sum(counts), "E": E, "device": case.device} | case.layer
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    local = list(placement.local_experts[rank])
    config, q = None, None
    if case.variant:
        q = make_quantized(VARIANTS[case.variant], **options)
        layer = q.layer
        weights = q.q1.weight[local], q.q2.weight[local]
        config = q.config(**{k: v if v is None else v[local] for k, v in q.scales.items()})
    else:
        layer = make_layer(**options)
        weights = layer.w1[local], layer.w2[local]
    tokens = replace(
        layer,
        hidden_states=layer.hidden_states[own],
        topk_weights=layer.topk_weights[own],
        topk_ids=layer.topk_ids[own],
    )
    x, _, _, topk_weights, topk_ids = tokens.args
    experts, num_dropped, room = case.experts, None, []
    if case.is_batched:
        room = [case.max_tokens_per_rank]
        tokens, num_dropped = kept(tokens, placement, rank, *room)
        experts = BATCHED[experts]
    if parts is None:
        parts = (PARTS | OWN_FINALIZE)[case.parts](placement, *room, quant_config=config)
    if case.is_batched:
        room = [parts.max_num_tokens]
    biases = (b if b is None else b[local] for b in (layer.w1_bias, layer.w2_bias))
    kernel = FusedMoEModularKernel(parts, experts(*room, *biases, quant_config=config))
    return Shard(
        tokens if q is None else replace(q, layer=tokens),
        num_dropped,
        kernel,
        (x, *weights, topk_weights, topk_ids),
        {
            "inplace": case.inplace,
            "expert_map": parts.expert_map,
            "apply_router_weight_on_input": layer.apply_router_weight_on_input,
        },
    )


def poisoned_batch(*args: Any) -> tuple[Tensor, ...]:
    """``batch_tokens``, with NaN in rows without a token: those that travel, and those that reach the experts."""
    batch, rows, expert_num_tokens, num_dropped = batch_tokens(*args)
    return poison(batch, expert_num_tokens), rows, expert_num_tokens, num_dropped


def run_case(case: Case, rank: int, num_ranks: int) -> None:
    shard = make_shard(case, rank, num_ranks)
    function: Callable[..., Tensor] = shard.kernel
    if case.backend:
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, backend=case.backend)
    x = shard.args[0].clone()
    poisons = case.is_batched and not case.backend
    with mock.patch.object(batched_all_to_all, "batch_tokens", poisoned_batch) if poisons else nullcontext():
        result = function(x, *shard.args[1:], **shard.options)
    shard.check(result)
    assert (result is x) is case.inplace
    assert case.inplace or torch.equal(x, shard.args[0])


def run_cases(rank: int, num_ranks: int, seed: int, step: int = 1, device: str = "cpu") -> None:
    """Every ``step``-th case; on GPUs without those that only CPUs compute."""
    for name, case in itertools.islice(cases(), 0, None, step):
        if device != "cpu" and case.layer.get("dtype") is torch.float64:
            continue
        torch.manual_seed(seed)
        try:
            run_case(replace(case, device=device), rank, num_ranks)
        except Exception as e:
            raise AssertionError(f"{name}, rank {rank} of {num_ranks}, seed {seed}: {e}") from e
