"""Parts that a user writes, in the published style, in every combination with the built-in ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe import (
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    MoEPrepareAndFinalizeNoEP,
    PrepareResult,
    TorchExperts,
    TritonExperts,
)
from tests.support.devices import on_each_device
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Prepared = tuple[Tensor, Tensor | None, Tensor | None]


class UserExperts(FusedMoEPermuteExpertsUnpermute):
    """Every expert over every slot: both GEMMs' results in workspace13, the activation's in workspace2."""

    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        # Dispatch may double the rows, and M is that before dispatch.
        return 2 * M * topk * max(N, K), 2 * M * topk * N, torch.float32

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
        M, topk = topk_ids.shape
        N, K, I = w1.size(1), w2.size(1), w2.size(2)
        S = M * topk
        ids = topk_ids.flatten().long()
        if expert_map is not None:
            known = (ids >= 0) & (ids < global_num_experts)
            ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
        gate_up = workspace13[: S * N].view(S, N)
        intermediate = workspace2[: S * I].view(S, I)
        rows = hidden_states.repeat_interleave(topk, 0)
        for e in range(w1.size(0)):
            gate_up += (rows @ w1[e].t()) * (ids == e).unsqueeze(1)
        self.activation(activation, intermediate, gate_up)
        out = workspace13[: S * K].view(S, K).zero_()
        for e in range(w1.size(0)):
            out += (intermediate.to(w2.dtype) @ w2[e].t()) * (ids == e).unsqueeze(1)
        return out.view(M, topk, K).to(hidden_states.dtype)


def weighted(fused_out: Tensor, topk_weights: Tensor, on_input: bool) -> Tensor:
    return fused_out.float() if on_input else fused_out.float() * topk_weights.unsqueeze(-1)


class IndexAdd(FusedMoEPrepareAndFinalize):
    """Counts on zeros in ``output``, and on finite values in every slot."""

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
    ) -> Prepared | PrepareResult:
        if apply_router_weight_on_input:
            a1 = (a1 * topk_weights).to(a1.dtype)
        return a1, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        M, topk, K = fused_expert_output.shape
        terms = weighted(fused_expert_output, topk_weights, apply_router_weight_on_input)
        tokens = torch.arange(M, device=output.device).repeat_interleave(topk)
        output.index_add_(0, tokens, terms.view(M * topk, K).to(output.dtype))


class Overwriting(IndexAdd):
    """Writes ``output`` whatever it holds, so that it also works in place."""

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        output.copy_(weighted(fused_expert_output, topk_weights, apply_router_weight_on_input).sum(1))


class Dispatching(IndexAdd):
    """As expert parallelism does: experts see other rows than the layer, here all twice and in reverse."""

    def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
        topk_weights, topk_ids = args[2], args[3]
        a1, _, _ = super().prepare(a1, *args)[:3]
        rows, ids, weights = (torch.cat([t, t]).flip(0) for t in (a1, topk_ids, topk_weights))
        return PrepareResult(rows, topk_ids=ids, topk_weights=weights)

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any) -> None:
        assert fused_expert_output.size(0) == 2 * output.size(0)
        super().finalize(output, fused_expert_output.flip(0)[: output.size(0)], *args)


EXPERTS: dict[str, Callable[[], FusedMoEPermuteExpertsUnpermute]] = {
    "user-experts": UserExperts,
    "triton": TritonExperts,
    "torch": TorchExperts,
}
PARTS: dict[str, Callable[[], FusedMoEPrepareAndFinalize]] = {
    "index-add": IndexAdd,
    "overwriting": Overwriting,
    "dispatching": Dispatching,
    "no-ep": MoEPrepareAndFinalizeNoEP,
}
CHOSEN = ("plain", "M0", "odd", "topk1-on-input", "skipped-mapped", "ungated")


# Parts that run other GEMMs than plain PyTorch does round as often, but elsewhere.
FACTOR = 4.0


def call(kernel: Callable[..., Tensor], layer: Layer, backend: str | None = None, **options: Any) -> Tensor:
    if backend is not None:
        kernel = torch.compile(kernel, fullgraph=True, backend=backend)
    options = {k: v for k, v in layer.options.items() if not k.endswith("bias")} | options
    return kernel(*layer.args, **options)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("case", CHOSEN)
def test_every_combination(case: str, parts: str, experts: str, device: str, poison_empty: None) -> None:
    layer = make_layer(**CASES[case], device=device)
    assert_as_accurate(call(FusedMoEModularKernel(PARTS[parts](), EXPERTS[experts]()), layer), layer, FACTOR)


#: Each part once or more, users' and ours in both places.
DIAGONAL = (
    ("index-add", "user-experts"),
    ("dispatching", "triton"),
    ("no-ep", "user-experts"),
    ("overwriting", "torch"),
)


@on_each_device(
    "case,parts,experts",
    itertools.product(["M0", "topk1-on-input", "skipped-mapped"], PARTS, EXPERTS),
    on_cpu=[
        *itertools.product(["skipped-mapped"], PARTS, EXPERTS),
        *((case, *pair) for case in ("M0", "topk1-on-input") for pair in DIAGONAL),
    ],
)
def test_every_combination_compiled(case: str, parts: str, experts: str, device: str) -> None:
    layer = make_layer(**CASES[case], device=device)
    kernel = FusedMoEModularKernel(PARTS[parts](), EXPERTS[experts]())
    assert_as_accurate(call(kernel, layer, "aot_eager"), layer, FACTOR)


@pytest.mark.parametrize(("parts", "experts"), DIAGONAL)
def test_through_inductor(parts: str, experts: str, device: str) -> None:
    layer = make_layer(E=3, skipped=True, mapped=True, dtype=torch.bfloat16, device=device)
    kernel = FusedMoEModularKernel(PARTS[parts](), EXPERTS[experts]())
    assert_as_accurate(call(kernel, layer, "inductor"), layer, FACTOR)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("parts", ["overwriting", "no-ep"])
def test_in_place(parts: str, experts: str, backend: str | None, device: str) -> None:
    layer = make_layer(device=device)
    given = layer.hidden_states
    layer.hidden_states = given.clone()
    result = call(FusedMoEModularKernel(PARTS[parts](), EXPERTS[experts]()), layer, backend, inplace=True)
    assert result.data_ptr() == layer.hidden_states.data_ptr()
    layer.hidden_states = given
    assert_as_accurate(result, layer, FACTOR)


def test_in_place_hands_hidden_states_to_finalize(device: str) -> None:
    """As published: a finalize that adds then adds onto the layer's input."""
    layer = make_layer(device=device)
    expected = layer.hidden_states + layer.reference()
    result = call(FusedMoEModularKernel(IndexAdd(), TritonExperts()), layer, inplace=True)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


class Recording(UserExperts):
    """Keeps what the kernel hands over."""

    def workspace_shapes(self, *args: Any, **kwargs: Any) -> tuple[int, int, torch.dtype]:
        self.problem = args
        return super().workspace_shapes(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        self.workspaces = [(w, w.clone()) for w in (kwargs["workspace13"], kwargs["workspace2"])]
        self.arguments = kwargs
        return super().apply(*args, **kwargs)


def test_workspaces_are_zeros_of_the_asked_sizes(device: str, poison_empty: None) -> None:
    layer = make_layer(M=9, K=48, I=40, E=5, topk=2, mapped=True, device=device)
    experts = Recording()
    call(FusedMoEModularKernel(IndexAdd(), experts), layer)
    assert experts.problem[0] is layer.hidden_states and experts.problem[1:] == (9, 80, 48, 2, 10)
    for (workspace, at_start), size in zip(experts.workspaces, (2 * 9 * 2 * 80, 2 * 9 * 2 * 80), strict=True):
        assert workspace.shape == (size,) and workspace.dtype is torch.float32
        assert workspace.device == layer.hidden_states.device
        assert (at_start == 0).all()
        assert (workspace != 0).any(), "the experts ran elsewhere"
    assert (
        experts.arguments["global_num_experts"] == 10 and experts.arguments["expert_map"] is layer.expert_map
    )


def test_scales_reach_user_parts(device: str) -> None:
    """The kernel passes on what it doesn't know: quantized parts are the user's own business."""
    layer = make_layer(device=device)
    seen: dict[str, Any] = {}

    class Scaled(IndexAdd):
        def prepare(self, a1: Tensor, a1_scale: Any, a2_scale: Any, *args: Any) -> Prepared:
            seen.update(a1_scale=a1_scale, prepared_a2_scale=a2_scale)
            return a1, a1_scale, None

    experts = Recording()
    names = ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale")
    scales = {name: torch.rand(1, device=device) for name in names}
    assert_as_accurate(call(FusedMoEModularKernel(Scaled(), experts), layer, **scales), layer, FACTOR)
    seen |= experts.arguments
    assert all(seen[name] is scale for name, scale in scales.items())
    assert seen["prepared_a2_scale"] is scales["a2_scale"] and seen["a1q_scale"] is scales["a1_scale"]


class Packed(UserExperts):
    """Weights of int8, two to a byte along their last dimension, which its own ``apply`` unpacks."""

    def apply(self, hidden_states: Tensor, w1: Tensor, w2: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        unpacked = (self.unpack(w).to(hidden_states.dtype) / 4 for w in (w1, w2))
        return super().apply(hidden_states, *unpacked, *args, **kwargs)

    @staticmethod
    def pack(w: Tensor) -> Tensor:
        """Integers of -8 to 7."""
        low, high = w[..., ::2] & 15, w[..., 1::2] & 15
        return (low | high << 4).to(torch.uint8)

    @staticmethod
    def unpack(packed: Tensor) -> Tensor:
        nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).int()
        return nibbles - 16 * (nibbles > 7)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("parts", ["overwriting", "no-ep"])
def test_weights_in_a_format_of_the_users_own(parts: str, backend: str | None, device: str) -> None:
    """K comes from w2.size(1), never from a trailing dimension, which packing halves."""
    layer = make_layer(device=device)
    layer.w1, layer.w2 = (torch.randint(-8, 8, w.shape, device=device) for w in (layer.w1, layer.w2))
    packed = [Packed.pack(w) for w in (layer.w1, layer.w2)]
    layer.w1, layer.w2 = (w.to(layer.hidden_states.dtype) / 4 for w in (layer.w1, layer.w2))
    expected = layer.reference()
    layer.w1, layer.w2 = packed
    result = call(FusedMoEModularKernel(PARTS[parts](), Packed()), layer, backend)
    torch.testing.assert_close(result, expected.to(result.dtype), rtol=1e-4, atol=1e-3)


class Localizing(IndexAdd):
    """Maps global ids to this rank's, which hold the second half of them, in ``prepare``."""

    def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
        ids, num_experts = args[3], args[4]
        first = num_experts // 2
        return PrepareResult(a1, None, None, torch.where(ids >= first, ids - first, -1))


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_ids_of_a_space_that_only_the_users_prepare_knows(backend: str | None, device: str) -> None:
    layer = make_layer(E=3, device=device)
    local = layer.topk_ids.clone()
    layer.topk_ids = local + 3
    layer.topk_ids[::2, 0] = 1
    result = call(FusedMoEModularKernel(Localizing(), UserExperts()), layer, backend, global_num_experts=6)
    local[::2, 0] = -1
    layer.topk_ids = local
    assert_as_accurate(result, layer, FACTOR)
