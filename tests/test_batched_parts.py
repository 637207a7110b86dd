"""Parts in the batched format, ours with a user's and with each other, and what those say that don't fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTorchExperts,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    FusedMoEQuantConfig,
    MoEPrepareAndFinalizeNoEP,
    PrepareResult,
    TorchExperts,
    TritonExperts,
)
from tests.support.batched import EXPERTS, PoisonedParts, batched_kernel, kept, options_of, poison
from tests.support.oracle import CASES, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS = 7


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


@BACKENDS
@pytest.mark.parametrize("experts", [*EXPERTS, UserExperts])
@pytest.mark.parametrize("parts", [UserParts, PoisonedParts])
@pytest.mark.parametrize("case", ["plain", "M0", "M1", "topk1-on-input", "all-on-one", "ungated"])
def test_combinations(case: str, parts: type[Any], experts: Any, backend: str | None, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    made = EXPERTS[experts](ROWS) if isinstance(experts, str) else experts()
    kernel = FusedMoEModularKernel(parts() if parts is UserParts else parts(ROWS), made)
    assert_as_accurate(run(kernel, layer, backend), kept(layer, ROWS).layer)


@BACKENDS
@pytest.mark.parametrize("case", ["skipped-mapped", "topk1-on-input", "all-on-one"])
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


class Returning(BatchedPrepareAndFinalize):
    """Whatever it is told instead of what it prepared."""

    def __init__(self, change: Callable[..., Any], **options: Any) -> None:
        super().__init__(ROWS, **options)
        self.change = change

    def prepare(self, *args: Any) -> Any:
        return self.change(*super().prepare(*args)[:3])


INT8 = FusedMoEQuantConfig("int8_w8a8_channel")


def prepared_by(change: Callable[..., Any]) -> Callable[[], FusedMoEModularKernel]:
    return lambda: FusedMoEModularKernel(Returning(change), BatchedTritonExperts(ROWS))


class Unbatched(MoEPrepareAndFinalizeNoEP):
    """Prepares a batch, and leaves finalize as it is."""

    def prepare(self, a1: Tensor, *args: Any) -> Any:
        return a1.new_zeros(5, ROWS, 48), None, torch.zeros(5, dtype=torch.int32)


class WrongShape(BatchedTritonExperts):
    def apply(self, *args: Any, **options: Any) -> Tensor:
        return super().apply(*args, **options)[:, 1:]


def pair(parts: Callable[[], Any], experts: Callable[[], Any]) -> Callable[[], FusedMoEModularKernel]:
    return lambda: FusedMoEModularKernel(parts(), experts())


# What doesn't fit, on a layer of M = 9, K = 48, E = 5, topk = 2.
# fmt: off
MISFITS: dict[str, tuple[Callable[[], FusedMoEModularKernel], type[Exception], str]] = {
    "batch-for-triton": (pair(lambda: BatchedPrepareAndFinalize(7), TritonExperts), ValueError,
        r"TritonExperts takes tokens \(M, K\) without .*got \(5, 7, 48\) with them; .*BatchedTritonExperts"),
    "batch-for-torch": (pair(lambda: BatchedPrepareAndFinalize(7), TorchExperts), ValueError,
        r"TorchExperts takes tokens \(M, K\) without .*got \(5, 7, 48\) with them; .*BatchedTorchExperts"),
    "tokens-for-triton": (pair(MoEPrepareAndFinalizeNoEP, lambda: BatchedTritonExperts(7)), ValueError,
        r"BatchedTritonExperts takes the batched format.*got \(9, 48\) without expert_num_tokens; prepare must"),
    "tokens-for-torch": (pair(MoEPrepareAndFinalizeNoEP, lambda: BatchedTorchExperts(7)), ValueError,
        r"BatchedTorchExperts takes the batched format.*got \(9, 48\) without expert_num_tokens; .*Batched"),
    "other-capacity": (pair(lambda: BatchedPrepareAndFinalize(7), lambda: BatchedTritonExperts(8)), ValueError,
        r"max_num_tokens = 8, as BatchedTritonExperts was constructed, got \(5, 7, 48\); construct both"),
    "no-counts": (prepared_by(lambda a, s, n: (a, s, None)), ValueError,
        r"batched format.*got \(5, 7, 48\) without expert_num_tokens"),
    "counts-2d": (prepared_by(lambda a, s, n: (a, s, n[None])), ValueError,
        r"expert_num_tokens must be \(E,\) = \(5,\), got \(1, 5\)"),
    "counts-fewer": (prepared_by(lambda a, s, n: (a, s, n[:4])), ValueError,
        r"expert_num_tokens must be \(E,\) = \(5,\), got \(4,\)"),
    "counts-float": (prepared_by(lambda a, s, n: (a, s, n.float())), TypeError,
        r"expert_num_tokens must be int32 or int64, got torch.float32"),
    "counts-list": (prepared_by(lambda a, s, n: (a, s, [1, 2, 3])), TypeError,
        r"expert_num_tokens must be a tensor or None, got list"),
    "counts-elsewhere": (prepared_by(lambda a, s, n: (a, s, n.to("meta"))), ValueError,
        r"expert_num_tokens must be on the device of hidden_states, cpu, got meta"),
    "experts-fewer": (prepared_by(lambda a, s, n: (a[:4], s, n[:4])), ValueError,
        r"batched hidden states must be \(E=5, max_num_tokens, K\), got \(4, 7, 48\)"),
    "K-narrow": (prepared_by(lambda a, s, n: (a[:, :, :8], s, n)), ValueError, r"must agree in K, got \(5, 7, 8\)"),
    "tokens-after-all": (prepared_by(lambda a, s, n: (a[0, :0].new_zeros(9, 48), None, None)), ValueError,
        r"Returning prepared \(9, 48\), but its finalize is for batches \(E, max_num_tokens, K\); override"),
    "finalize-of-tokens": (pair(Unbatched, lambda: BatchedTritonExperts(7)), ValueError,
        r"Unbatched prepared \(5, 7, 48\), but its finalize is for tokens \(M, K\); override finalize"),
    "scale-2d": (lambda: FusedMoEModularKernel(
            Returning(lambda a, s, n: (a, s.flatten(0, 1), n), quant_config=INT8),
            BatchedTritonExperts(7, quant_config=INT8)), ValueError,
        r"a1q_scale must be \(5, 7, 'scales of a token'\), or \(1,\) for all, got \(35, 1\)"),
    "result-of-another-shape": (pair(lambda: BatchedPrepareAndFinalize(7), lambda: WrongShape(7)), ValueError,
        r"apply must return \(E, max_num_tokens, K\) = \(5, 7, 48\), got \(5, 6, 48\)"),
    "other-experts": (pair(lambda: BatchedPrepareAndFinalize(7, 4), lambda: BatchedTritonExperts(7)), ValueError,
        r"num_local_experts must be the number of experts, 5, where there is no expert_map, got 4"),
    "two-configs": (pair(lambda: BatchedPrepareAndFinalize(7, quant_config=INT8), lambda: BatchedTritonExperts(7)),
        ValueError, r"BatchedTritonExperts without a quant_config .*takes no a1q_scale"),
}
# fmt: on


@pytest.fixture
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback of everything that raises inside a fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case: str, quiet_fakes: None) -> None:
    """Refused by the fake in the same words."""
    make, kind, message = MISFITS[case]
    layer = make_layer()
    with pytest.raises(kind, match=message) as real:
        make()(*layer.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(kind) as fake:
        make()(*tree_map_only(Tensor, mode.from_tensor, layer.args))
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("case", ["batch-for-triton", "tokens-for-triton", "other-capacity", "no-counts"])
def test_misfits_compiled(case: str) -> None:
    make, _, _ = MISFITS[case]
    with pytest.raises(Exception, match=r"(?s)\(M, K\)|batched format|construct both"):
        torch.compile(make(), fullgraph=True, backend="aot_eager")(*make_layer().args)


def test_an_expert_map_needs_the_number_of_local_experts() -> None:
    layer = make_layer(mapped=True)
    kernel = FusedMoEModularKernel(BatchedPrepareAndFinalize(7), BatchedTritonExperts(7))
    with pytest.raises(ValueError, match="num_local_experts must be given where there is an expert_map"):
        kernel(*layer.args, expert_map=layer.expert_map)


@pytest.mark.parametrize("make", [BatchedPrepareAndFinalize, BatchedTritonExperts, BatchedTorchExperts])
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (0, ValueError, "max_num_tokens must be at least 1, got 0"),
        (7.0, TypeError, "max_num_tokens must be an int, got float"),
        (None, TypeError, "max_num_tokens must be an int, got NoneType"),
        (2**31, ValueError, "fewer than 2.31 - 1 rows"),
    ],
)
def test_capacities(make: Callable[..., Any], given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(given)


@pytest.mark.parametrize("given", [0, 1.5])
def test_numbers_of_local_experts(given: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="num_local_experts must be"):
        BatchedPrepareAndFinalize(7, given)


def test_finalize_without_prepare() -> None:
    layer = make_layer()
    parts = BatchedPrepareAndFinalize(18)
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(18))
    kernel(*layer.args)
    _, _, _, weights, ids = layer.args
    with pytest.raises(RuntimeError, match="BatchedPrepareAndFinalize finalizes what it prepared, once"):
        parts.finalize(torch.zeros(9, 48), torch.zeros(5, 18, 48), weights, ids, False)
    parts.prepare(layer.hidden_states, None, None, weights, ids, 5, None, False)
    with pytest.raises(ValueError, match=r"output must be \(M, K\) = \(9, 48\), got \(9, 47\)"):
        parts.finalize(torch.zeros(9, 47), torch.zeros(5, 18, 48), weights, ids, False)


def test_gradients_are_refused(device: str) -> None:
    layer = make_layer(device=device)
    layer.hidden_states.requires_grad_()
    out = batched_kernel(layer, 18)(*layer.args)
    with pytest.raises(NotImplementedError, match=r"compile_moe::reduce_batch .*torch\.no_grad\(\)"):
        out.sum().backward()
