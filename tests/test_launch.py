"""Launchers on a simulated GPU: which kernels load at which call; nothing compiles inside a capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compile_moe.ops import (
    act_and_mul,
    gather_gemm,
    route_and_sort_tokens,
    route_tokens,
    scatter_gemm,
    sort_tokens,
    weight_and_reduce,
)
from compile_moe.ops.kernels import act_and_mul as kernels
from compile_moe.ops.kernels import launch as launch_module
from compile_moe.ops.kernels.precision import dot_precision
from compile_moe.ops.named_activations import program_text
from tests.support.launchers import launch
from tests.support.oracle import Layer, make_layer
from tests.support.simulated_gpu import simulated_gpu

SHAPE: dict[str, Any] = {"K": 64, "I": 32, "E": 4, "topk": 2, "dtype": torch.bfloat16}


def launch_layer(layer: Layer) -> None:
    """Every launch of a layer; results are not computed."""
    x, w1, w2, weights, ids = layer.args
    m, topk = ids.shape
    slots, offsets = launch(sort_tokens, ids, w1.size(0), layer.expert_map)
    rows = launch(gather_gemm, x, w1, slots, offsets, topk, layer.w1_bias, program_text("silu"))
    out = launch(scatter_gemm, rows, w2, slots, offsets, m, topk, layer.w2_bias)
    launch(weight_and_reduce, out, weights, ids, layer.expert_map, w1.size(0))


@pytest.mark.parametrize("first", [1, 7, 3000])
@pytest.mark.parametrize(
    "options",
    [{}, {"mapped": True, "biased": True, "transposed": True}, {"K": 100, "I": 36, "transposed": True}],
    ids=str,
)
def test_other_token_counts_compile_nothing(first: int, options: dict[str, Any]) -> None:
    options = {**SHAPE, **options}
    base = make_layer(M=first, **options)
    with simulated_gpu() as gpu:
        launch_layer(base)
        loaded = list(gpu.loaded)
        assert len(set(loaded)) >= 5
        gpu.capturing = True
        for m in (1, 2, 5, 8, 16, 17, 64, 256, 1000, 2048, 2049, 6000):
            other = make_layer(M=m, **options)
            other.w1, other.w2 = base.w1, base.w2
            launch_layer(other)
            assert gpu.loaded == loaded, f"M = {m} loaded another variant"


def test_number_of_launches() -> None:
    with simulated_gpu() as gpu:
        launch_layer(make_layer(M=5, **SHAPE))
        assert gpu.launched == [
            "sort_tiny_kernel",
            "gather_gemm_kernel",
            "scatter_gemm_kernel",
            "weight_and_reduce_kernel",
        ]
        gpu.launched.clear()
        launch_layer(make_layer(M=4000, **SHAPE))
        assert gpu.launched[:3] == ["block_histograms_kernel", "scan_blocks_kernel", "scatter_slots_kernel"]


def test_no_tokens_launch_no_gemm() -> None:
    with simulated_gpu() as gpu:
        launch_layer(make_layer(M=0, **SHAPE))
        assert gpu.launched == ["sort_tiny_kernel"], "the offsets must still be written"


def test_first_call_inside_a_capture_raises() -> None:
    gate_up = torch.randn(3, 64)
    with simulated_gpu() as gpu:
        gpu.capturing = True
        with pytest.raises(RuntimeError, match=r"act_and_mul .* before capturing.* compile_moe\.warm_up"):
            launch(act_and_mul, gate_up, program_text("silu"))
        assert gpu.loaded == gpu.launched == []
        gpu.capturing = False
        launch(act_and_mul, gate_up, program_text("silu"))
        gpu.capturing = True
        launch(act_and_mul, gate_up, program_text("silu"))
        assert gpu.launched == ["act_and_mul_kernel"] * 2
        with pytest.raises(RuntimeError, match="act_and_mul"):
            launch(act_and_mul, gate_up, program_text("gelu"))


@pytest.mark.parametrize("first", [1, 30, 3000])
def test_routers_compile_nothing_for_other_token_counts(first: int) -> None:
    routing = 2, "softmax"
    with simulated_gpu() as gpu:
        for op in (route_tokens, route_and_sort_tokens):
            launch(op, torch.randn(first, 8), *routing)
        loaded = list(gpu.loaded)
        gpu.capturing = True
        for m in (1, 2, 8, 9, 64, 65, 2048, 2049, 6000):
            for op in (route_tokens, route_and_sort_tokens):
                launch(op, torch.randn(m, 8), *routing)
            assert gpu.loaded == loaded, f"M = {m} loaded another variant"


def test_router_and_sort_are_one_launch_for_few_tokens() -> None:
    with simulated_gpu() as gpu:
        launch(route_tokens, torch.randn(0, 8), 2, "softmax")
        assert gpu.launched == []
        for m in (0, 1, 64):
            launch(route_and_sort_tokens, torch.randn(m, 8), 2, "softmax")
        assert gpu.launched == ["route_and_sort_kernel"] * 3
        gpu.launched.clear()
        launch(route_and_sort_tokens, torch.randn(65, 8), 2, "softmax")
        assert gpu.launched == ["route_tokens_kernel", "sort_small_kernel"]
        gpu.launched.clear()
        launch(route_and_sort_tokens, torch.randn(3000, 8), 2, "softmax")
        assert gpu.launched == [
            "route_tokens_kernel",
            "block_histograms_kernel",
            "scan_blocks_kernel",
            "scatter_slots_kernel",
        ]


def test_float32_precision_is_torchs() -> None:
    """Set in the old ways or in the new one."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("high", "tf32"), ("highest", "ieee"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(precision)
            assert dot_precision(torch.float32) == expected
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert dot_precision(torch.float32) == ("tf32" if allowed else "ieee")
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert dot_precision(torch.float32) == precision
        assert dot_precision(torch.bfloat16) == "16-bit"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_launches_while_the_inputs_device_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    launched_on: list[int] = []

    @contextlib.contextmanager
    def device_guard(device: torch.device) -> Iterator[None]:
        current.append(1)
        yield
        current.pop()

    with simulated_gpu() as gpu:
        gpu.on_launch = lambda: launched_on.append(current[-1])
        monkeypatch.setattr(launch_module, "device_guard", device_guard)
        for _ in range(2):
            launch(act_and_mul, torch.randn(3, 64), program_text("silu"))
    assert launched_on == [1, 1] and current == [0]


def test_one_tensor_given_twice_does_not_bind_two() -> None:
    """What is remembered of a launch is which argument a tensor is, not which tensor."""
    out, out2 = torch.empty(3, 64), torch.empty(3, 64)
    x, x2 = torch.randn(3, 64), torch.randn(3, 64)
    with simulated_gpu() as gpu:
        kernels.act_and_mul(x, x, "", "ungated")
        kernels.act_and_mul(out, x2, "", "ungated")
        kernels.act_and_mul(out2, x, "", "ungated")
        given = [args[:2] for args in gpu.arguments]
    assert [
        (a is b, c is d) for (a, c), (b, d) in zip(given, [(x, x), (out, x2), (out2, x)], strict=True)
    ] == [(True, True)] * 3


def test_a_launch_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(M=5, **SHAPE)
    with simulated_gpu() as gpu:
        launch_layer(layer)
        ready = dict(launch_module._ready)
        launch_layer(layer)
        assert launch_module._ready == ready
        assert gpu.launched[:4] == gpu.launched[4:]
        assert [a for a in gpu.arguments[1] if not isinstance(a, torch.Tensor)] == [
            a for a in gpu.arguments[5] if not isinstance(a, torch.Tensor)
        ]
        monkeypatch.setattr(launch_module, "_MOST_READY", 4)
        launch_layer(make_layer(M=6, **SHAPE))
        assert len(launch_module._ready) <= 4


def test_kernels_may_outlive_the_simulated_device() -> None:
    """Without anything to unload, which they would want to do whenever they go."""
    with simulated_gpu():
        launch(act_and_mul, torch.randn(3, 64), program_text("silu"))
        kept = [each.compiled for ready in launch_module._ready.values() for each in ready]
        assert kept and all(kernel.module is not None for kernel in kept)
    assert all(kernel.module is None for kernel in kept)
