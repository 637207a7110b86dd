"""Kernels that are launched before the ones ahead of them have ended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import compile_moe
from compile_moe.ops import quantize_tokens
from compile_moe.ops.kernels.early_launch import can_launch_early, early_launch
from tests.support.oracle import make_layer


@pytest.mark.parametrize(("major", "early"), [(8, False), (9, True), (10, True), (12, True)])
def test_by_compute_capability(major: int, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    assert can_launch_early.__wrapped__(0) is early


def test_interpreted_kernels_are_not() -> None:
    assert early_launch(torch.device("cpu")) == {"EARLY": False}


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 40, 700])
@torch.no_grad()
def test_layers_that_read_what_the_one_before_wrote(m: int) -> None:
    """80 layers one behind the other, as fast as they can be launched, give what they give one at a time."""
    layer = make_layer(M=m, K=128, I=64, E=16, topk=4, dtype=torch.bfloat16, device="cuda")
    args = layer.args[1:]

    def chain(count: int, stop: bool) -> torch.Tensor:
        x = layer.hidden_states
        for _ in range(count):
            # Kernels of ours alone read what others of ours wrote, two launches before.
            y = x
            for _ in range(4):
                y = compile_moe.fused_experts(y, *args)
            x = y / y.float().norm(dim=-1, keepdim=True).to(y.dtype).clamp_min(1e-6)
            if stop:
                torch.cuda.synchronize()
        return x

    expected = chain(20, stop=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(20, stop=False)
    for _ in range(3):
        assert torch.equal(chain(20, stop=False), expected)
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["int8 per token", "int8 per group of 128"])
@pytest.mark.parametrize("m", [40, 700])
def test_quantizations_that_read_what_the_one_before_wrote(m: int, scaling: str) -> None:
    """Each quantizes what the one before gave, whose launch it doesn't wait for."""
    tokens = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, m // 2, m], dtype=torch.int32, device="cuda")

    def chain(stop: bool) -> list[torch.Tensor]:
        results, x = [], tokens
        for i in range(40):
            quantized, scales = quantize_tokens(x, scaling, None, None, offsets if i % 2 else None)
            # The same memory, as numbers of 16 bits that are neither infinite nor NaN.
            x = (quantized.view(torch.int16) & 0x3FFF).view(torch.bfloat16).repeat(1, 2)
            results += [quantized, scales]
            if stop:
                torch.cuda.synchronize()
        return results

    expected = chain(stop=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(stop=False)
    for _ in range(3):
        assert all(map(torch.equal, chain(stop=False), expected))
        graph.replay()
        assert all(map(torch.equal, captured, expected))
