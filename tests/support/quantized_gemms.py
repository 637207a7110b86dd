"""The two GEMMs of quantized layers: their arguments, float64, and the same scheme in plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from compile_moe.ops.sort_tokens import sort_tokens_torch
from compile_moe.quantization import SCHEMES
from tests.support.oracle import noise
from tests.support.quantized import VARIANTS, Quantized, Variant
from tests.support.quantized_inputs import op, stage_inputs

GEMMS = ("quantized_gather_gemm", "quantized_scatter_gemm")


def _defaults() -> dict[str, Variant]:
    found = {}
    for name, scheme in sorted(SCHEMES.items()):
        variant = Variant(name, tuple((f.name, f.default) for f in dataclasses.fields(scheme)))
        has_zero_points = variant.made.zero_point_shape(2, 2, 512) is not None
        found[f"{name}-default"] = dataclasses.replace(variant, zero_points=has_zero_points)
    return found


#: Every scheme with the sizes that it has by default, and zero points if it has any then.
DEFAULTS = _defaults()

ALL_VARIANTS = VARIANTS | DEFAULTS


def spread(t: Tensor) -> Tensor:
    """The same numbers with no stride 1 and something else between them."""
    storage = torch.full([2 * n + 1 for n in t.shape], 77, dtype=torch.uint8, device=t.device)
    wide = storage.to(t.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


class Gemms:
    """Arguments of both GEMMs for one layer."""

    def __init__(self, q: Quantized) -> None:
        self.q = q
        self.slots, self.offsets = sort_tokens_torch(q.layer.topk_ids, q.layer.w1.size(0), q.layer.expert_map)
        inputs = stage_inputs(q)
        self.inputs = {stage: inputs[stage] for stage in GEMMS}

    def exact(self, stage: str) -> Tensor:
        """In float64, which a CPU computes in, by the formula of the scheme's ``dequantize``."""
        return op(stage)(*self._in_float64(stage))

    def _in_float64(self, stage: str) -> list[Any]:
        x, x_scale, w, w_scale, w_zp, *rest = self.inputs[stage]
        out_dtype = self.q.layer.hidden_states.dtype
        changed = [torch.float64 if a is out_dtype else a for a in rest]
        changed = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in changed]
        if x.dtype is out_dtype:
            x = x.double()
        if w_scale.is_floating_point():
            w_scale = w_scale.float()
        return [x, x_scale, w, w_scale, w_zp, *changed]

    def plain(self, stage: str) -> Tensor:
        """Both operands dequantized into the activations' dtype, and one GEMM an expert in it."""
        q, dtype = self.q, self.q.layer.hidden_states.dtype
        x, x_scale = self.inputs[stage][:2]
        scaling = q.variant.made.token_scaling
        if scaling is not None:
            x = (x.float() * scaling.expand(x_scale, x.size(1))).to(dtype)
        first = stage == "quantized_gather_gemm"
        w, bias = (q.layer.w1, q.layer.w1_bias) if first else (q.layer.w2, q.layer.w2_bias)
        topk = q.layer.topk_ids.size(1)
        rows = x[self.slots.long() // topk] if first else x
        out = torch.zeros(rows.size(0), w.size(1), dtype=dtype)
        for e in range(w.size(0)):
            mine = slice(int(self.offsets[e]), int(self.offsets[e + 1]))
            y = rows[mine] @ w[e].to(dtype).t()
            out[mine] = y if bias is None else y + bias[e]
        if first:
            out = q.layer.function(out)
            out[int(self.offsets[-1]) :] = 0
            return out
        return torch.empty_like(out).index_copy(0, self.slots.long(), out).view(-1, topk, w.size(1))

    def check(self, stage: str, result: Tensor, factor: float = 2.0) -> None:
        """The tolerance rule of :func:`tests.support.oracle.assert_as_accurate`."""
        exact, plain = self.exact(stage), self.plain(stage)
        dtype = plain.dtype
        assert result.shape == exact.shape and result.dtype is dtype
        assert torch.isfinite(result).all(), "not finite"
        if not result.numel():
            return
        factor *= noise(exact, dtype)
        error, bound = ((r.double() - exact).norm().item() for r in (result, plain))
        bound = factor * (bound + torch.finfo(dtype).eps * exact.abs().max().item())
        assert error <= bound, f"{stage}: error {error:.3e} exceeds {factor} x plain PyTorch's: {bound:.3e}"
