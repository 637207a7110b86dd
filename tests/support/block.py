"""A whole block around the layer: fused, in plain PyTorch, and how their choices and errors compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compile_moe
from tests.support import oracle


def clamped_mish(gate_up: Tensor) -> Tensor:
    """No activation that has a name."""
    gate, up = gate_up.chunk(2, -1)
    return F.mish(gate.clamp(max=1.5)) * up.tanh()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**oracle.ACTIVATIONS, "callable": clamped_mish}


@dataclass
class Block:
    """RMSNorm, router, experts, residual, the next layer's RMSNorm."""

    hidden_states: Tensor
    norms: Tensor
    router: Tensor
    w1: Tensor
    w2: Tensor
    topk: int
    activation: str = "silu"
    topk_ids: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Block:
        tensors = self.hidden_states, self.norms, self.router, self.w1, self.w2
        return Block(*(t.to(dtype) for t in tensors), self.topk, self.activation, self.topk_ids)

    def normalised(self) -> Tensor:
        return rms_norm(self.hidden_states, self.norms[0])

    def logits(self) -> Tensor:
        return self.normalised() @ self.router.t()

    def reference(self) -> Tensor:
        """Unfused, in plain PyTorch, for a given choice of experts: the sum and the normalised sum, (2, M, K)."""
        assert self.topk_ids is not None
        dtype = torch.float64 if self.hidden_states.dtype is torch.float64 else torch.float32
        weights = self.logits().softmax(-1, dtype).gather(1, self.topk_ids)
        weights = weights / weights.sum(-1, keepdim=True)
        function = ACTIVATIONS[self.activation]
        layer = oracle.Layer(self.normalised(), self.w1, self.w2, weights, self.topk_ids, function=function)
        y = self.hidden_states + layer.reference()
        return torch.stack([y, rms_norm(y, self.norms[1])])


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def make_block(
    M: int = 37,
    K: int = 256,
    I: int = 96,
    E: int = 18,
    topk: int = 4,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    activation: str = "silu",
) -> Block:
    n = I if activation.endswith("_no_mul") else 2 * I

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    weights = randn(E, K, scale=K**-0.5), randn(E, n, K, scale=K**-0.5), randn(E, K, I, scale=I**-0.5)
    return Block(randn(M, K), 1 + randn(2, K, scale=0.1), *weights, topk, activation)


class FusedBlock(nn.Module):
    """The block on the library: hidden_states to the sum, the normalised sum and the choice of experts."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.topk = block.topk
        self.activation: Any = clamped_mish if block.activation == "callable" else block.activation
        for name in ("norms", "router", "w1", "w2"):
            self.register_parameter(name, nn.Parameter(getattr(block, name), requires_grad=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = rms_norm(x, self.norms[0])
        weights, ids = (h @ self.router.t()).softmax(-1, dtype=torch.float32).topk(self.topk)
        y = x + self.experts(h, weights / weights.sum(-1, keepdim=True), ids)
        return y, rms_norm(y, self.norms[1]), ids

    def experts(self, h: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return compile_moe.fused_experts(h, self.w1, self.w2, weights, ids, activation=self.activation)


def assert_block_as_accurate(results: tuple[Tensor, Tensor, Tensor], block: Block) -> None:
    """The tolerance rule for what a :class:`FusedBlock` returns, given the experts it chose; these are the best."""
    y, normalised, ids = results
    _assert_best(ids, block)
    # The rule asks a layer for no more than a block has.
    given: Any = replace(block, topk_ids=ids)
    oracle.assert_as_accurate(torch.stack([y, normalised]), given)


def _assert_best(ids: Tensor, block: Block) -> None:
    """Experts of the largest logits, but for rounding, and none twice."""
    logits = block.to(torch.float64).logits()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    assert (chosen.sum(1) == block.topk).all()
    worst = logits.masked_fill(~chosen, torch.inf).amin(1)
    best_left = logits.masked_fill(chosen, -torch.inf).amax(1)
    assert (worst >= best_left - 16 * torch.finfo(block.hidden_states.dtype).eps).all()
