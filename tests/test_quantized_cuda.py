"""Quantized layers on a GPU: the GEMMs alone, on operands quantized by a CPU, and whole layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe
from tests.support.quantized import Quantized, assert_as_accurate, make_quantized
from tests.support.quantized_gemms import ALL_VARIANTS, DEFAULTS, GEMMS, Gemms, spread
from tests.support.quantized_inputs import op

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo", "no_grad")]

SHAPE: dict[str, Any] = {"K": 512, "I": 384, "E": 8, "topk": 2, "biased": True}
TOKENS = (0, 1, 17, 300)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def on_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def with_weights_of(first: Quantized, m: int, **options: Any) -> Quantized:
    """Other tokens and another routing for the weights of ``first``."""
    dtype = first.layer.hidden_states.dtype
    other = make_quantized(first.variant, M=m, dtype=dtype, **(SHAPE | options))
    for name in ("w1", "w2", "w1_bias", "w2_bias"):
        setattr(other.layer, name, getattr(first.layer, name))
    other.q1, other.q2 = first.q1, first.q2
    return other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_gemms(variant: str, dtype: torch.dtype) -> None:
    first = make_quantized(ALL_VARIANTS[variant], M=5, dtype=dtype, **SHAPE)
    for m in TOKENS:
        gemms = Gemms(with_weights_of(first, m, skipped=m == 17))
        for stage in GEMMS:
            gemms.check(stage, op(stage)(*map(on_gpu, gemms.inputs[stage])).cpu())


@pytest.mark.parametrize("variant", [v for v in DEFAULTS if DEFAULTS[v].made.token_scaling is None])
def test_float32(variant: str) -> None:
    gemms = Gemms(make_quantized(DEFAULTS[variant], M=17, **SHAPE))
    for stage in GEMMS:
        gemms.check(stage, op(stage)(*map(on_gpu, gemms.inputs[stage])).cpu())


@pytest.mark.parametrize("variant", DEFAULTS)
def test_odd_sizes_and_strides(variant: str) -> None:
    """Nothing divides a tile, and no element lies beside the next one."""
    q = make_quantized(DEFAULTS[variant], M=40, K=203, I=77, E=3, biased=True, dtype=torch.bfloat16)
    gemms = Gemms(q)
    for stage in GEMMS:
        arguments = [on_gpu(a) for a in gemms.inputs[stage]]
        gemms.check(stage, op(stage)(*arguments).cpu())
        strided = [
            spread(a) if isinstance(a, Tensor) and a.dtype is not torch.int32 else a for a in arguments
        ]
        gemms.check(stage, op(stage)(*strided).cpu())


@pytest.mark.parametrize("activation", ["swigluoai", "relu2_no_mul"])
def test_other_layouts_of_gate_and_up(activation: str) -> None:
    for variant in ("mxfp4_w4a16-default", "fp8_w8a8_block-default"):
        gemms = Gemms(
            make_quantized(DEFAULTS[variant], M=70, activation=activation, dtype=torch.bfloat16, **SHAPE)
        )
        gemms.check(GEMMS[0], op(GEMMS[0])(*map(on_gpu, gemms.inputs[GEMMS[0]])).cpu())


def both(
    inputs: dict[str, tuple[Any, ...]], first: Callable[..., Tensor], second: Callable[..., Tensor]
) -> Any:
    return first(*inputs[GEMMS[0]]), second(*inputs[GEMMS[1]])


@pytest.mark.parametrize("variant", DEFAULTS)
def test_compiled_once_for_all_token_counts(variant: str) -> None:
    first = make_quantized(DEFAULTS[variant], M=7, dtype=torch.bfloat16, **SHAPE)
    counter = CompileCounterWithBackend("inductor")
    ops = [op(stage) for stage in GEMMS]
    compiled = torch.compile(lambda inputs: both(inputs, *ops), backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 17, 300):
        gemms = Gemms(with_weights_of(first, m))
        for stage, result in zip(GEMMS, compiled(on_gpu_all(gemms)), strict=True):
            gemms.check(stage, result.cpu())
    assert counter.frame_count == 1


def on_gpu_all(gemms: Gemms) -> dict[str, tuple[Any, ...]]:
    return {stage: tuple(map(on_gpu, gemms.inputs[stage])) for stage in GEMMS}


@pytest.mark.parametrize("m", [1, 64])
@pytest.mark.parametrize("variant", DEFAULTS)
def test_replayed_with_other_inputs(variant: str, m: int) -> None:
    first = make_quantized(DEFAULTS[variant], M=m, dtype=torch.bfloat16, **SHAPE)
    inputs = on_gpu_all(Gemms(first))
    ops = [op(stage) for stage in GEMMS]
    both(inputs, *ops)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both(inputs, *ops)
    for options in ({"routing": "one"}, {"routing": "empty"}, {"skipped": True}):
        gemms = Gemms(with_weights_of(first, m, **options))
        for stage in GEMMS:
            for held, other in zip(inputs[stage], gemms.inputs[stage], strict=True):
                if isinstance(held, Tensor):
                    held.copy_(other)
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        for stage, result in zip(GEMMS, results, strict=True):
            gemms.check(stage, result.cpu())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", DEFAULTS)
def test_layer(variant: str, compiled: bool) -> None:
    first = make_quantized(DEFAULTS[variant], M=5, dtype=torch.bfloat16, **SHAPE)
    function: Any = compile_moe.fused_experts
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=True)
    for m in (17, 300) if compiled else TOKENS:
        q = with_weights_of(first, m, skipped=m == 17)
        args, options = q.on_gpu()
        assert_as_accurate(function(*args, **options).cpu(), q)


@pytest.mark.parametrize("variant", DEFAULTS)
def test_torch_experts(variant: str) -> None:
    """Plain PyTorch on a GPU."""
    q = make_quantized(DEFAULTS[variant], M=9, dtype=torch.bfloat16, **SHAPE)
    args, options = q.on_gpu()
    config = options["quant_config"]
    biases = options["w1_bias"], options["w2_bias"]
    kernel = compile_moe.FusedMoEModularKernel(
        compile_moe.MoEPrepareAndFinalizeNoEP(config), compile_moe.TorchExperts(*biases, config)
    )
    assert_as_accurate(kernel(*args).cpu(), q)


def test_float8_below_its_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    gemms = Gemms(make_quantized(dataclasses.replace(DEFAULTS["fp8_w8a8_channel-default"]), M=3))
    for stage in GEMMS:
        with pytest.raises(NotImplementedError, match=rf"{stage}: scheme fp8.* 8\.9 .*dequantize_weights"):
            op(stage)(*map(on_gpu, gemms.inputs[stage]))
