"""Keeping dynamo out of the ops' implementations.

An op that runs between two graphs (after a graph break) runs in Python frames that dynamo would compile like any
others: down to Triton's launcher, which it can't.
"""

from __future__ import annotations

from typing import Any

import torch

eval_frame: Any = None
try:
    # The C part only: importing torch._dynamo costs seconds, and who never compiles doesn't need it.
    from torch._C._dynamo import eval_frame

    _SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
except (ImportError, AttributeError):  # pragma: no cover - depends on the torch version
    _SKIP = None


def untraced(function: Any) -> Any:
    """``function``, a Python function, and all that it calls, out of dynamo's sight."""
    if _SKIP is None:
        return torch.compiler.disable(function)
    eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    return function
