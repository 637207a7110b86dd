"""Tokens that are hard to quantize, and equality of quantized ones."""

from __future__ import annotations

import torch
from torch import Tensor

SCALINGS = [
    f"{dtype} per {per}"
    for dtype in ("float8_e4m3fn", "int8")
    for per in ("tensor", "token", "group of 128", "group of 7")
]
#: Scales and maxima that a call may give, as :func:`given` makes them.
GIVEN = ("static", "static each", "maxima")


def heavy_tailed(m: int, k: int, dtype: torch.dtype, special: bool = True, device: str = "cpu") -> Tensor:
    """From denormal to huge; among more than a few tokens, where ``special``, zeros, an infinity and NaNs.

    On a CPU first, so that every device has the same numbers.
    """
    x = torch.randn(m, k) * torch.exp(3 * torch.randn(m, k))
    if dtype is torch.float16:
        # Finite, also what tests double.
        x.clamp_(-30000, 30000)
    # Halves, and their neighbours, between what int8 and float8 have.
    x[:, ::3] = x[:, ::3].sign() * torch.randint(0, 255, x[:, ::3].shape) / 2
    if m > 4 and special:
        x[0] *= 1e-39
        x[1] = 0
        x[1, ::2] = -0.0
        x[2, k // 2] = torch.inf
        x[3, k // 3] = torch.nan
        x[4, k // 2], x[4, 0] = -torch.inf, torch.nan
    return x.to(dtype).to(device)


def given(kind: str, tokens: Tensor) -> tuple[Tensor | None, ...]:
    """``scale`` and ``maxima`` of a call per tensor."""
    if kind == "static":
        return (torch.tensor([0.37], device=tokens.device),)
    if kind == "static each":
        return ((torch.rand(len(tokens), 1) + 0.01).to(tokens.device),)
    maxima = torch.rand(3000, device=tokens.device)
    if tokens.numel():
        maxima[2999] = tokens.float().abs().amax()
    return None, maxima


def assert_same_bits(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal numbers, zeros of equal signs, NaN in the same places: its bits are no promise."""
    for result, e in zip(results, expected, strict=True):
        assert (result.shape, result.dtype, result.stride()) == (e.shape, e.dtype, e.stride())
        r, e = (t.cpu().float() for t in (result, e))
        assert torch.equal(r.isnan(), e.isnan())
        r, e = (t.nan_to_num(nan=0.0).view(torch.int32) for t in (r, e))
        assert torch.equal(r, e), f"{(r != e).sum()} of {r.numel()} differ"
