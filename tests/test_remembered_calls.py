"""Calls that are remembered launch the same again over the tensors of the new call, and others are not remembered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

import compile_moe
from compile_moe.ops import registry
from compile_moe.ops.fused_moe import run_experts
from compile_moe.ops.kernels import launch as launching
from compile_moe.ops.kernels import remembered_calls
from compile_moe.ops.kernels.remembered_calls import remembering
from compile_moe.ops.named_activations import program_text, resolve
from tests.support.oracle import CASES, Layer, assert_as_accurate, make_layer
from tests.support.simulated_gpu import SimulatedGPU, simulated_gpu

layer_module = sys.modules["compile_moe.fused_experts"]
SHAPE: dict[str, Any] = {"M": 5, "K": 64, "I": 32, "E": 4, "topk": 2, "dtype": torch.bfloat16}
GEMMS = ["sort_tiny_kernel", "gather_gemm_kernel", "scatter_gemm_kernel"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    """On which ops run their CUDA implementations on tensors of the CPU."""

    def runs_directly(*tensors: Tensor | None) -> bool:
        return not registry.is_watched()

    monkeypatch.setattr(registry, "runs_directly", runs_directly)
    monkeypatch.setattr(layer_module, "runs_directly", runs_directly)
    with simulated_gpu() as simulated:
        yield simulated


def experts(layer: Layer) -> tuple[Any, ...]:
    return layer.hidden_states, layer.w1, layer.w2, layer.topk_ids, resolve("silu"), None, None, None, False


def cuda(op: str, *arguments: Any) -> Any:
    """What the op runs on a GPU."""
    return registry._cuda_implementations[getattr(torch.ops.compile_moe, op).default](*arguments)


def as_addresses(arguments: tuple[Any, ...]) -> list[Any]:
    return [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]


def test_a_layer_is_launched_again_over_new_tensors(gpu: SimulatedGPU) -> None:
    run = remembering(run_experts)
    first, second = make_layer(**SHAPE), make_layer(**SHAPE)
    out = run(*experts(first))
    recorded = [as_addresses(arguments) for arguments in gpu.arguments]
    given = {t.data_ptr(): i for i, t in enumerate(first.args)} | {out.data_ptr(): "out"}
    gpu.arguments.clear()
    again = run(*experts(second))
    assert gpu.launched == GEMMS * 2
    assert (again.shape, again.dtype, again.stride()) == (out.shape, out.dtype, out.stride())
    new = [t.data_ptr() for t in second.args]
    scratch: dict[int, int] = {}
    for before, after in zip(recorded, gpu.arguments, strict=True):
        assert len(before) == len(after) and not any(isinstance(a, Tensor) for a in after)
        for old, value in zip(before, after, strict=True):
            if old in given:
                assert value == (again.data_ptr() if given[old] == "out" else new[given[old]])
            elif old != value:
                # The same temporary memory for the same tensor, wherever it is read or written.
                assert scratch.setdefault(old, value) == value and value % 256 == min(scratch.values()) % 256
    # Slots, offsets and intermediate, none of which overlap.
    sizes = (10 * 4, 5 * 4, 10 * 32 * 2)
    assert len(scratch) == len(set(scratch.values())) == 3
    assert max(scratch.values()) - min(scratch.values()) <= sum(-(-size // 256) * 256 for size in sizes)


@pytest.mark.parametrize(
    "changed",
    [{"M": 6}, {"K": 32}, {"dtype": torch.float16}, {"transposed": True}, {"ids_dtype": torch.int32}],
    ids=str,
)
def test_another_description_is_another_call(gpu: SimulatedGPU, changed: dict[str, Any]) -> None:
    run = remembering(run_experts)
    run(*experts(make_layer(**SHAPE)))
    gpu.arguments.clear()
    run(*experts(make_layer(**{**SHAPE, **changed})))
    assert any(isinstance(a, Tensor) for arguments in gpu.arguments for a in arguments), "not worked out anew"


def test_precision_and_alignment_are_part_of_it(gpu: SimulatedGPU) -> None:
    layer = make_layer(**{**SHAPE, "dtype": torch.float32})
    run = remembering(run_experts)
    calls = remembered_calls._remembered[run_experts]
    run(*experts(layer))
    try:
        torch.set_float32_matmul_precision("high")
        run(*experts(layer))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(calls) == 2
    layer.hidden_states = torch.cat([torch.zeros(1), layer.hidden_states.flatten()])[1:].view(5, 64)
    run(*experts(layer))
    assert len(calls) == 3 and all(calls.values())


def test_strides_that_nobody_steps_along_are_not(gpu: SimulatedGPU) -> None:
    run = remembering(run_experts)
    calls = remembered_calls._remembered[run_experts]
    layer = make_layer(**{**SHAPE, "M": 1})
    wide = torch.cat([layer.hidden_states] * 2, 1)
    run(*experts(layer))
    for tokens in (wide[:, :64], wide.repeat(3, 1)[1:2, 64:]):
        layer.hidden_states = tokens
        gpu.arguments.clear()
        run(*experts(layer))
        assert tokens.data_ptr() in gpu.arguments[1]
    assert len(calls) == 1
    layer.hidden_states = torch.cat([layer.hidden_states.unsqueeze(2)] * 2, 2)[:, :, 0]
    run(*experts(layer))
    assert len(calls) == 2


def test_calls_run_again_while_the_inputs_device_is_current(
    gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, guarded, launched = torch.zeros(5, 2, dtype=torch.int64), [], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        guarded.append(index)
        yield
        guarded.clear()

    cuda("sort_tokens", ids, 4, None)
    monkeypatch.setattr(launching, "is_current_device", lambda index: False)
    monkeypatch.setattr(torch.cuda, "device", device)
    gpu.on_launch = lambda: launched.extend(guarded)
    cuda("sort_tokens", ids, 4, None)
    assert launched == [ids.get_device()] and guarded == []


def test_hooks_of_triton_see_calls_that_are_remembered(gpu: SimulatedGPU) -> None:
    run, names = remembering(run_experts), []
    original = CompiledKernel.launch_metadata

    def launch_metadata(kernel: Any, *args: Any) -> Any:
        names.append(kernel.name)
        return original(kernel, *args)

    def hook(metadata: Any) -> None:
        pass

    layer = make_layer(**SHAPE)
    run(*experts(layer))
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        with mock.patch.object(CompiledKernel, "launch_metadata", launch_metadata):
            run(*experts(layer))
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert names == GEMMS and gpu.launched == GEMMS * 2
    assert [len(arguments) for arguments in gpu.arguments[:3]] == [
        len(arguments) for arguments in gpu.arguments[3:]
    ]


def test_ops_remember_their_calls(gpu: SimulatedGPU) -> None:
    for _ in range(2):
        slots, offsets = cuda("sort_tokens", torch.zeros(5, 2, dtype=torch.int64), 4, None)
        assert (slots.shape, offsets.shape, slots.dtype) == ((10,), (5,), torch.int32)
    assert gpu.launched == ["sort_tiny_kernel"] * 2
    assert gpu.arguments[1][:2] == (slots.data_ptr(), offsets.data_ptr())


def test_what_computes_by_other_means_is_not_remembered(gpu: SimulatedGPU) -> None:
    text, whole = program_text("silu"), torch.randn(3, 5, 128)
    for gate_up in (whole, whole[:, :, ::2].mT.contiguous().mT):
        for _ in range(2):
            cuda("act_and_mul", gate_up, text)
    # The second one is copied to be rows.
    calls = remembered_calls._remembered[
        registry._cuda_implementations[torch.ops.compile_moe.act_and_mul.default].__wrapped__
    ]
    assert [call is None for call in calls.values()] == [False, True]
    assert [isinstance(arguments[0], Tensor) for arguments in gpu.arguments] == [True, False, True, True]


def test_what_is_not_remembered(gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    run = remembering(run_experts)
    calls = remembered_calls._remembered[run_experts]
    run(*experts(make_layer(**{**SHAPE, "M": 0})))
    same = make_layer(**{**SHAPE, "E": 2, "K": 32, "I": 32})
    run(
        same.hidden_states,
        same.w1[:, :32],
        same.w1[:, :32],
        same.topk_ids,
        program_text("silu_no_mul"),
        *[None] * 3,
        False,
    )
    monkeypatch.setattr(remembered_calls, "_MOST_BYTES", 1000)
    run(*experts(make_layer(**SHAPE)))
    assert list(calls.values()) == [None] * 3


def test_debugging_bypasses_it(gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.zeros(5, 2, dtype=torch.int64)
    cuda("sort_tokens", ids, 4, None)
    cuda("sort_tokens", ids + 9, 4, None)
    monkeypatch.setenv("COMPILE_MOE_DEBUG", "1")
    with pytest.raises(ValueError, match="got 9"):
        cuda("sort_tokens", ids + 9, 4, None)


def test_the_memory_is_bounded(gpu: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered_calls, "_MOST_CALLS", 3)
    run = remembering(run_experts)
    for m in range(1, 9):
        run(*experts(make_layer(**{**SHAPE, "M": m})))
        assert 1 <= len(remembered_calls._remembered[run_experts]) <= 3


def remembered_layers() -> list[Any]:
    return list(remembered_calls._remembered[layer_module._layer_remembered.__wrapped__].values())


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__
)
def test_layers(gpu: SimulatedGPU, mode: Callable[[], Any]) -> None:
    """What torch computes in a layer, and where, is seen in every mode."""
    with mode():
        for options in ({}, {"mapped": True, "biased": True}):
            for _ in range(2):
                layer = make_layer(**SHAPE, **options)
                compile_moe.fused_experts(*layer.args, **layer.options)
        assert [call is not None for call in remembered_layers()] == [True, True]
        assert gpu.launched == [*GEMMS, "weight_and_reduce_kernel"] * 4
        on_input = make_layer(**{**SHAPE, "topk": 1}, apply_router_weight_on_input=True)
        strided = make_layer(**SHAPE, mapped=True)
        assert strided.expert_map is not None
        strided.expert_map = torch.stack([strided.expert_map] * 2, 1)[:, 0]
        for layer in (on_input, strided):
            gpu.arguments.clear()
            for _ in range(2):
                compile_moe.fused_experts(*layer.args, **layer.options)
            assert all(isinstance(arguments[0], Tensor) for arguments in gpu.arguments[1:])
        assert remembered_layers()[2:] == [None, None]


def test_calls_that_nobody_can_watch_are_not_remembered(gpu: SimulatedGPU) -> None:
    with torch._C._DisableTorchDispatch():
        cuda("sort_tokens", torch.zeros(5, 2, dtype=torch.int64), 4, None)
    sort = registry._cuda_implementations[torch.ops.compile_moe.sort_tokens.default].__wrapped__
    assert list(remembered_calls._remembered[sort].values()) == [None]


def test_a_tensor_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="hidden_states must be a tensor"):
        compile_moe.fused_experts(None, None, None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@pytest.mark.parametrize("case", CASES)
def test_repeated_calls(case: str, mode: Callable[[], Any], device: str) -> None:
    """Each call with other tokens, routing and weights; earlier results stay."""
    layers = [make_layer(**CASES[case], dtype=torch.bfloat16, device=device) for _ in range(4)]
    with mode():
        results = [compile_moe.fused_experts(*layer.args, **layer.options) for layer in layers]
    for layer, result in zip(layers, results, strict=True):
        assert_as_accurate(result, layer)
    if device == "cuda" and case in ("plain", "biased", "mapped", "skipped"):
        assert any(remembered_layers())
