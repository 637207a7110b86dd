"""Parts in the batched format, ours with a user's and with each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    MoEPrepareAndFinalizeNoEP,
    PrepareResult,
)
from tests.support.batched import EXPERTS, PoisonedParts, batched_kernel, kept, options_of, poison
from tests.support.devices import on_each_device
from tests.support.oracle import CASES, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS = 7
# Users' parts compute in plain PyTorch, in another order than the reference's.
FACTOR = 4.0


class UserParts(FusedMoEPrepareAndFinalize):
    """The published interface in plain PyTorch: cumulative sums say which row a slot gets. No slot is skipped."""

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if apply_router_weight_on_input:
            a1 = (a1 * topk_weights).to(a1.dtype)
        self.max_num_tokens = ROWS
        row, counts = self.rows(topk_ids, num_experts)
        batch = a1.new_zeros(num_experts * ROWS + 1, a1.size(1))
        batch[row] = a1.repeat_interleave(topk_ids.size(1), 0)
        batch = poison(batch[:-1].view(num_experts, ROWS, -1), counts)
        self.num_experts = num_experts
        return batch, None, counts

    def rows(self, topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        """Each slot's row of the flattened batch, one behind it where the expert is full; tokens of each expert."""
        chosen = F.one_hot(topk_ids.flatten().long(), num_experts)
        position = (chosen.cumsum(0) * chosen).sum(1) - 1
        row = torch.where(position < ROWS, topk_ids.flatten().long() * ROWS + position, num_experts * ROWS)
        return row, chosen.sum(0).clamp(max=ROWS).to(torch.int32)

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        e, rows, k = fused_expert_output.shape
        row, _ = self.rows(topk_ids, e)
        terms = F.pad(fused_expert_output.reshape(e * rows, k), (0, 0, 0, 1))[row].view(*topk_ids.shape, k)
        if not apply_router_weight_on_input:
            terms = terms * topk_weights.unsqueeze(-1)
        output += terms.sum(1).to(output.dtype)


class UserExperts(FusedMoEPermuteExpertsUnpermute):
    """Both GEMMs over all rows, in the workspaces."""

    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return num_experts * ROWS * max(N, K), num_experts * ROWS * N, a.dtype

    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        assert expert_num_tokens is not None
        e, rows, k = hidden_states.shape
        gate_up = workspace13[: e * rows * w1.size(1)].view(e, rows, -1)
        gate_up += hidden_states @ w1.mT
        intermediate = workspace2[: e * rows * w2.size(2)].view(e, rows, -1)
        self.activation(activation, intermediate, gate_up)
        out = workspace13[: e * rows * k].view(e, rows, k)
        out.copy_(intermediate @ w2.mT)
        return poison(out, expert_num_tokens)


class OwnFinalize(BatchedPrepareAndFinalize):
    """Ours inside its own, as subclasses of the unbatched class do."""

    def finalize(self, output: Tensor, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            assert (output == 0).all()
        super().finalize(output, *args)
        output.mul_(2)


class DoublingPrepare(BatchedPrepareAndFinalize):
    def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
        return super().prepare(2 * a1, *args)


class HalvingExperts(BatchedTritonExperts):
    def apply(self, *args: Any, **options: Any) -> Tensor:
        return super().apply(*args, **options) / 2


BACKENDS = pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"], ids=str)


def run(kernel: Callable[..., Tensor], layer: Any, backend: str | None) -> Tensor:
    if backend is not None:
        kernel = torch.compile(kernel, fullgraph=True, backend=backend)
    with torch.no_grad():
        return kernel(*layer.args, **options_of(layer))


PAIRS = list(itertools.product([UserParts, PoisonedParts], [*EXPERTS, UserExperts]))
COMBINED = ("plain", "M0", "M1", "topk1-on-input", "all-on-one", "ungated")


# Each pair compiled, with all cases among a pair of ours and one of the user's.
@on_each_device(
    "case,parts,experts,backend",
    [(c, *pair, b) for c in COMBINED for pair in PAIRS for b in (None, "aot_eager", "inductor")],
    on_cpu=[
        *((c, *pair, None) for c in COMBINED for pair in PAIRS),
        *(("topk1-on-input", *pair, "aot_eager") for pair in PAIRS),
        *(("all-on-one", *pair, "inductor") for pair in PAIRS),
        *(("M0", *pair, "inductor") for pair in (PAIRS[2], PAIRS[3])),
        *((c, *pair, "aot_eager") for c in ("M1", "ungated") for pair in (PAIRS[2], PAIRS[3])),
    ],
)
def test_combinations(case: str, parts: type[Any], experts: Any, backend: str | None, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    made = EXPERTS[experts](ROWS) if isinstance(experts, str) else experts()
    kernel = FusedMoEModularKernel(parts() if parts is UserParts else parts(ROWS), made)
    assert_as_accurate(run(kernel, layer, backend), kept(layer, ROWS).layer, FACTOR)


SUBCLASSED = ("skipped-mapped", "topk1-on-input", "all-on-one")


@on_each_device(
    "case,backend",
    itertools.product(SUBCLASSED, [None, "aot_eager", "inductor"]),
    on_cpu=[
        *itertools.product(SUBCLASSED, [None]),
        *(("topk1-on-input", "aot_eager"), ("skipped-mapped", "inductor")),
    ],
)
def test_subclasses(case: str, backend: str | None, device: str) -> None:
    """Halves of doubles: each override is called, once."""
    layer = make_layer(**CASES[case], device=device)
    expected = kept(layer, ROWS).layer
    assert_as_accurate(
        run(batched_kernel(layer, ROWS, HalvingExperts, parts=OwnFinalize), layer, backend), expected
    )
    expected.hidden_states = 2 * expected.hidden_states
    result = run(batched_kernel(layer, ROWS, parts=DoublingPrepare), layer, backend)
    assert_as_accurate(result, expected)


class BatchedInside(MoEPrepareAndFinalizeNoEP):
    """Prepares a batch; finalize is that of tokens."""

    def prepare(self, *args: Any) -> Any:
        return UserParts().prepare(*args)


class BackToTokens(BatchedTritonExperts):
    """Takes a batch, and returns (M, topk, K)."""

    def apply(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor, **options: Any
    ) -> Tensor:
        out = super().apply(hidden_states, w1, w2, topk_ids, **options)
        row, _ = UserParts().rows(topk_ids, w1.size(0))
        return F.pad(out.flatten(0, 1), (0, 0, 0, 1))[row].view(*topk_ids.shape, -1)


@BACKENDS
def test_a_batch_may_be_between_tokens(backend: str | None, device: str) -> None:
    layer = make_layer(M=20, device=device)
    kernel = FusedMoEModularKernel(BatchedInside(), BackToTokens(ROWS))
    assert_as_accurate(run(kernel, layer, backend), kept(layer, ROWS).layer, FACTOR)


def test_quantized_by_a_published_prepare() -> None:
    """A user's class, whose tokens have scales as (E, max_num_tokens, 1)."""
    from compile_moe.ops import quantize_tokens
    from tests.support.quantized import VARIANTS, make_quantized
    from tests.support.quantized import assert_as_accurate as assert_quantized_as_accurate

    class Quantizing(UserParts):
        def prepare(self, *args: Any) -> Any:
            batch, _, counts = super().prepare(*args)
            quantized, scale = quantize_tokens(batch.nan_to_num(0).flatten(0, 1), "int8 per token")
            return quantized.view(batch.shape), poison(scale.view(*batch.shape[:2], 1), counts), counts

    q = make_quantized(VARIANTS["int8_w8a8_channel"])
    kernel = FusedMoEModularKernel(Quantizing(), BatchedTritonExperts(ROWS, quant_config=q.config()))
    q.layer = kept(q.layer, ROWS).layer
    assert_quantized_as_accurate(kernel(*q.args), q)


def test_gradients_are_refused(device: str) -> None:
    layer = make_layer(device=device)
    layer.hidden_states.requires_grad_()
    out = batched_kernel(layer, 18)(*layer.args)
    with pytest.raises(NotImplementedError, match=r"compile_moe::reduce_batch .*torch\.no_grad\(\)"):
        out.sum().backward()


def test_a_failed_call_leaves_nothing_to_finalize() -> None:
    layer = make_layer()
    parts = BatchedPrepareAndFinalize(9)
    arguments = layer.topk_weights, layer.topk_ids, 5, None, False
    batch = parts.prepare(layer.hidden_states, None, None, *arguments)[0]
    with pytest.raises(ValueError, match="a1 must be"):
        parts.prepare(layer.hidden_states[0], None, None, *arguments)
    with pytest.raises(RuntimeError, match="call prepare of this instance first"):
        parts.reduce(batch, layer.topk_weights, None, None, -1, False)
