"""Launchers of the batched format on a simulated GPU: what compiles, and what a call remembers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops import batch_tokens, reduce_batch, registry, sort_batch
from compile_moe.ops.sort_tokens import sort_tokens_torch
from tests.support.launchers import launch
from tests.support.oracle import Layer, make_layer
from tests.support.simulated_gpu import SimulatedGPU, simulated_gpu

SHAPE: dict[str, Any] = {"K": 64, "I": 32, "E": 4, "topk": 2, "dtype": torch.bfloat16}
ROWS = 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    monkeypatch.setattr(registry, "runs_directly", lambda *tensors: not registry.is_watched())
    with simulated_gpu() as simulated:
        yield simulated


def arguments_of(layer: Layer) -> dict[torch._ops.OpOverload, tuple[Any, ...]]:
    x, ids = layer.hidden_states, layer.topk_ids
    batch = torch.zeros(4, ROWS, 64, dtype=x.dtype)
    rows, counts = torch.zeros(ids.shape, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    return {
        batch_tokens: (x, *sort_tokens_torch(ids, 4), 2, ROWS),
        sort_batch: (counts, ROWS),
        reduce_batch: (batch, layer.topk_weights, rows),
    }


def test_other_token_counts_compile_nothing(gpu: SimulatedGPU) -> None:
    for op, arguments in arguments_of(make_layer(M=7, **SHAPE)).items():
        launch(op, *arguments)
    loaded = list(gpu.loaded)
    assert loaded == ["batch_tokens_kernel", "sort_batch_kernel", "reduce_batch_kernel"]
    gpu.capturing = True
    for m in (1, 2, 16, 17, 300):
        for op, arguments in arguments_of(make_layer(M=m, **SHAPE)).items():
            launch(op, *arguments)
        assert gpu.loaded == loaded, f"M = {m} loaded another variant"


def test_no_token_is_counted_nevertheless(gpu: SimulatedGPU) -> None:
    for op, arguments in arguments_of(make_layer(M=0, **SHAPE)).items():
        launch(op, *arguments)
    assert gpu.launched == ["batch_tokens_kernel", "sort_batch_kernel"]


def run(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """What the op runs on a GPU."""
    return registry._cuda_implementations[op](*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_calls_are_remembered(gpu: SimulatedGPU, dtype: torch.dtype) -> None:
    """The second is launched over its own tensors, by their addresses."""
    for op in (batch_tokens, sort_batch, reduce_batch):
        first, second = (arguments_of(make_layer(M=5, **SHAPE))[op] for _ in range(2))
        if op is batch_tokens:
            first, second = ((a[0].to(dtype), *a[1:]) for a in (first, second))
        run(op, *first)
        gpu.arguments.clear()
        results = run(op, *second)
        (launched,) = gpu.arguments
        assert not any(isinstance(a, Tensor) for a in launched), "not remembered"
        tensors = [*(results if isinstance(results, tuple) else (results,)), *second]
        addresses = [t.data_ptr() for t in tensors if isinstance(t, Tensor)]
        assert list(launched[: len(addresses)]) == addresses
