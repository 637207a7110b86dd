"""Run an op's CUDA implementation on any tensors: CPU ones under the interpreter."""

from __future__ import annotations

import sys
from typing import Any

import torch


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that shows whether it was written: NaN, or a number that is no valid index."""
    value = torch.nan if dtype.is_floating_point else max(-(2**30), torch.iinfo(dtype).min)
    return torch.full(shape, value, dtype=dtype, device=device)


def launch(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call the launcher of ``op`` on poisoned outputs; return the output, or the tuple of them."""
    module = sys.modules[f"compile_moe.ops.{op._schema.name.split('::')[1]}"]
    module._check(*args)
    outputs = tuple(poisoned(tuple(shape), dtype, args[0].device) for shape, dtype in module._outputs(*args))
    module._launch(outputs, *args)
    return outputs[0] if len(outputs) == 1 else outputs
