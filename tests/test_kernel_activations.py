"""What may be given as ``activation``: names, records and every kind of callable, fused or not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compile_moe import (
    Activation,
    FusedMoEModularKernel,
    MoEPrepareAndFinalizeNoEP,
    TorchExperts,
    TritonExperts,
)
from tests.support.devices import on_each_device
from tests.support.oracle import assert_as_accurate, make_layer, swigluoai

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXPERTS = {"triton": TritonExperts, "torch": TorchExperts}


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate) * up


def normalised(gate_up: Tensor) -> Tensor:
    """Not pointwise: looks at a whole row."""
    gate, up = gate_up.chunk(2, -1)
    return gate.softmax(-1) * up


class Scaled(nn.Module):
    """An activation with a buffer, which no epilogue can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5))
        self.limit = 1.5

    def forward(self, gate_up: Tensor) -> Tensor:
        return geglu(gate_up) * self.scale

    def clamped(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=self.limit) * up


def clamped_silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)


scaled = Scaled()

#: What may be given as ``activation``, and the function it means.
ACTIVATIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "name": ("gelu", geglu),
    "record": (Activation("silu", limit=0.5), clamped_silu),
    "record-interleaved": (
        Activation("gelu", interleaved=True),
        lambda x: F.gelu(x[..., ::2]) * x[..., 1::2],
    ),
    "record-concatenated": (
        Activation("swigluoai", alpha=1.5, limit=1.0, interleaved=False),
        lambda x: swigluoai(torch.stack(x.chunk(2, -1), -1).flatten(-2), 1.5, 1.0),
    ),
    "function": (geglu, geglu),
    "function-of-a-row": (normalised, normalised),
    "partial": (functools.partial(torch.nn.functional.glu, dim=-1), lambda x: F.glu(x, -1)),
    "module": (scaled, scaled),
    "bound-method": (scaled.clamped, scaled.clamped),
}


# TorchExperts take no kind apart: compiled, those that differ to dynamo.
@on_each_device(
    "kind,compiled,experts",
    itertools.product(ACTIVATIONS, [False, True], EXPERTS),
    on_cpu=[
        *itertools.product(ACTIVATIONS, [False], EXPERTS),
        *itertools.product(ACTIVATIONS, [True], ["triton"]),
        *itertools.product(["name", "record", "function-of-a-row", "bound-method"], [True], ["torch"]),
    ],
)
def test_activation_kinds(kind: str, compiled: bool, experts: str, device: str) -> None:
    activation, function = ACTIVATIONS[kind]
    scaled.to(device)
    layer = make_layer(activation=activation, function=function, device=device, skipped=True, topk=3)
    # The oracle is a float64 copy of the layer, but a buffer keeps its dtype: 0.5 is exact in both.
    kernel: Callable[..., Tensor] = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), EXPERTS[experts]())
    if compiled:
        kernel = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert_as_accurate(kernel(*layer.args, activation=activation), layer)


class Clamp:
    """A callable object that is no module."""

    def __init__(self) -> None:
        self.limit = 10.0

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate.clamp(max=self.limit) * up


def from_closure(holder: Clamp) -> Callable[[Tensor], Tensor]:
    return lambda gate_up: Clamp.__call__(holder, gate_up)


@pytest.mark.parametrize(
    ("compiled", "kind"),
    [
        ("eager", "bound-method"),
        ("compiled", "bound-method"),
        ("eager", "object"),
        ("compiled", "object"),
        ("eager", "object-in-closure"),
        ("compiled", "object-in-closure"),
    ],
)
def test_a_changed_activation_is_seen(kind: str, compiled: str, device: str) -> None:
    clamp = Clamp()
    function = {"bound-method": clamp.__call__, "object": clamp, "object-in-closure": from_closure(clamp)}[
        kind
    ]
    layer = make_layer(activation=function, function=function, device=device)
    kernel: Callable[..., Tensor] = FusedMoEModularKernel(MoEPrepareAndFinalizeNoEP(), TritonExperts())
    if compiled == "compiled":
        kernel = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    for limit in (10.0, 0.1):
        clamp.limit = limit
        assert_as_accurate(kernel(*layer.args, activation=function), layer)
