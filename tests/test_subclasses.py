"""Subclasses of the built-in parts: whatever they override is called, and what they leave alone still fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe import (
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    PrepareResult,
    TorchExperts,
    TritonExperts,
)
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def double_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return 2 * gate * up + 1


class OwnActivation:
    """Computes something of its own, so that a bypass shows in the result. Not zero at zero."""

    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        assert activation == "silu"
        output.copy_(double_gate(input))


class TritonSubclass(TritonExperts):
    activation = OwnActivation.activation


class TorchSubclass(TorchExperts):
    activation = OwnActivation.activation


class SubSubclass(TritonSubclass):
    pass


class TritonMixin(OwnActivation, TritonExperts):  # type: ignore[misc]
    pass


def patched_class() -> TritonExperts:
    cls = type("Patched", (TritonExperts,), {})
    cls.activation = OwnActivation.activation  # type: ignore[method-assign,assignment]
    return cls()


def patched_instance() -> TritonExperts:
    experts = TritonExperts()
    experts.activation = OwnActivation().activation  # type: ignore[method-assign]
    return experts


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "make",
    [
        TritonSubclass,
        TorchSubclass,
        SubSubclass,
        TritonMixin,
        patched_class,
        patched_instance,
    ],
)
def test_own_activation_method(make: Callable[[], TritonExperts], backend: str | None, device: str) -> None:
    layer = make_layer(M=17, topk=3, skipped=True, biased=True, device=device, function=double_gate)
    experts = make()
    experts.w1_bias, experts.w2_bias = layer.w1_bias, layer.w2_bias
    assert_as_accurate(
        call(FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), experts), layer, backend), layer
    )


def call(kernel: Callable[..., Tensor], layer: Layer, backend: str | None = None, **options: Any) -> Tensor:
    if backend is not None:
        kernel = torch.compile(kernel, fullgraph=True, backend=backend)
    options = {k: v for k, v in layer.options.items() if not k.endswith("bias")} | options
    return kernel(*layer.args, **options)


def assert_finite(t: Tensor) -> None:
    if not torch.compiler.is_compiling():
        assert torch.isfinite(t).all(), "an unwritten slot reaches the user's code"


def halving(base: type[Any]) -> type[Any]:
    """A subclass whose apply shows in the result."""

    class Halving(base):
        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            out: Tensor = super().apply(*args, **kwargs)
            assert_finite(out)
            return out / 2

    return Halving


def negating(base: type[Any]) -> type[Any]:
    """A subclass whose finalize shows in the result, and that reads every slot."""

    class Negating(base):
        def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any) -> None:
            assert_finite(fused_expert_output)
            super().finalize(output, -fused_expert_output, *args)

    return Negating


def doubling(base: type[Any]) -> type[Any]:
    """A subclass whose prepare shows in the result."""

    class Doubling(base):
        def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
            return super().prepare(2 * a1, *args)

    return Doubling


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("base", [TritonExperts, TorchExperts])
@pytest.mark.parametrize("case", ["skipped", "skipped-mapped", "M0"])
def test_own_apply(case: str, base: type[Any], backend: str | None, device: str, poison_empty: None) -> None:
    layer = make_layer(**CASES[case], device=device)
    for experts, factor in ((halving(base), 2), (halving(halving(base)), 4)):
        result = call(FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), experts()), layer, backend)
        assert_as_accurate(result * factor, layer)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("experts", [TritonExperts, TorchExperts])
@pytest.mark.parametrize("case", ["skipped", "skipped-mapped", "topk1-on-input", "M0"])
def test_own_finalize(
    case: str, experts: type[Any], backend: str | None, device: str, poison_empty: None
) -> None:
    layer = make_layer(**CASES[case], device=device)
    result = call(FusedMoEModularKernel(negating(MoEPrepareAndFinalizeNoEP)(), experts()), layer, backend)
    assert_as_accurate(-result, layer)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", ["skipped-mapped", "topk1-on-input"])
def test_own_prepare(case: str, backend: str | None, device: str, poison_empty: None) -> None:
    layer = make_layer(**CASES[case], device=device)
    kernel = FusedMoEModularKernel(doubling(MoEPrepareAndFinalizeNoEP)(), TritonExperts())
    result = call(kernel, layer, backend)
    layer.hidden_states = 2 * layer.hidden_states
    assert_as_accurate(result, layer)


def test_own_prepare_and_finalize_of_two_subclasses(device: str) -> None:
    layer = make_layer(skipped=True, device=device)
    parts = doubling(negating(MoEPrepareAndFinalizeNoEP))()
    result = call(FusedMoEModularKernel(parts, TritonExperts()), layer)
    layer.hidden_states = 2 * layer.hidden_states
    assert_as_accurate(-result, layer)


class OwnFinalize:
    def finalize(self, output: Tensor, *args: Any) -> None:
        output.fill_(3)


class OwnApply:
    def apply(self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor, **rest: Any) -> Tensor:
        return hidden_states.new_ones((*topk_ids.shape, w2.size(1)))


@pytest.mark.parametrize("which", ["finalize", "apply"])
def test_methods_of_a_mixin_are_called(which: str, device: str) -> None:
    layer = make_layer(device=device)
    layer.topk_weights = torch.full_like(layer.topk_weights, 1.5)
    bases = {
        "finalize": ((OwnFinalize, MoEPrepareAndFinalizeNoEP), (TritonExperts,)),
        "apply": ((MoEPrepareAndFinalizeNoEP,), (OwnApply, TritonExperts)),
    }[which]
    parts, experts = (type("Mixed", b, {})() for b in bases)
    result = call(FusedMoEModularKernel(parts, experts), layer)
    torch.testing.assert_close(result, torch.full_like(result, 3))


class Unfilling(TritonExperts):
    """Leaves what it may leave unwritten as NaN, also where the allocation happened to hold numbers."""

    calls = 0

    def apply_unfilled(
        self, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor, **rest: Any
    ) -> Tensor:
        self.calls += 1
        out: Tensor = super().apply_unfilled(hidden_states, w1, w2, topk_ids, **rest)
        skipped = (topk_ids < 0) | (topk_ids >= rest["global_num_experts"])
        return torch.where(skipped.unsqueeze(-1), torch.nan, out)


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_unwritten_slots_are_masked(backend: str | None, device: str) -> None:
    layer = make_layer(M=17, topk=3, skipped=True, device=device)
    experts = Unfilling()
    kernel = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), experts)
    assert_as_accurate(call(kernel, layer, backend), layer)
    assert experts.calls == 1, "the shortcut of the built-in parts was not taken"


class Widening(MoEPrepareAndFinalizeNoEP):
    """Dispatches every token twice, and leaves finalize as it is."""

    def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
        return PrepareResult(torch.cat([a1, a1]), None, None, args[3].repeat(2, 1), args[2].repeat(2, 1))


@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_dispatched_rows_that_nobody_brings_back_are_refused(backend: str | None) -> None:
    layer = make_layer()
    kernel = FusedMoEModularKernel(Widening(), TritonExperts())
    with pytest.raises(Exception, match=r"reduce must return \(M, K\) = .*override it"):
        call(kernel, layer, backend)


class Dropping(MoEPrepareAndFinalizeNoEP):
    """Drops the second expert of every token, as a capacity limit would."""

    def prepare(self, a1: Tensor, *args: Any) -> PrepareResult:
        ids = args[3].clone()
        ids[:, 1] = -1
        return super().prepare(a1, *args)._replace(topk_ids=ids)


@pytest.mark.parametrize(
    "experts",
    [
        TritonExperts,
        Unfilling,
    ],
)
def test_slots_dropped_by_prepare_are_masked(experts: type[Any], device: str, poison_empty: None) -> None:
    layer = make_layer(device=device)
    result = call(FusedMoEModularKernel(Dropping(), experts()), layer)
    layer.topk_ids[:, 1] = -1
    assert_as_accurate(result, layer)
