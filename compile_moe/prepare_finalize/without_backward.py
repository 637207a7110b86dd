"""Results of collectives, which drop what autograd knows: asking for gradients raises instead of finding none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compile_moe.ops.registry import no_backward_message


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(no_backward_message("a layer over several ranks"))


def needing_gradients(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Those through which autograd would go."""
    if not torch.is_grad_enabled():
        return ()
    return tuple([t for t in tensors if t is not None and t.requires_grad])


def without_backward(result: Callable[[], Tensor], sources: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """``result``, whose tensor requires gradients where there are ``sources``, and raises when they are asked for."""
    if not sources:
        return result
    return lambda: _WithoutBackward.apply(result(), *sources)
