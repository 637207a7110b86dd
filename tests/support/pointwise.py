"""Activations as models write them: torch's pointwise functions and ways to take gate and up, whatever the library
knows. None of it is read off the library's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from torch import Tensor

Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor], Tensor]

#: Continuous and, between -4 and 4, of moderate slope: compositions of them stay comparable.
UNARY: dict[str, Unary] = {
    **{f.__name__: f for f in (torch.sigmoid, torch.tanh, torch.abs, torch.neg, torch.square, torch.sin)},
    **{f.__name__: f for f in (torch.cos, torch.erf, torch.erfc, torch.atan, torch.asinh, torch.cosh)},
    **{f.__name__: f for f in (torch.sinh, torch.exp, torch.exp2, torch.expm1, torch.sinc, torch.deg2rad)},
    **{f.__name__: f for f in (F.silu, F.gelu, F.relu, F.relu6, F.softplus, F.mish, F.elu, F.selu, F.celu)},
    **{f.__name__: f for f in (F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh, F.logsigmoid)},
    **{f.__name__: f for f in (F.softsign, F.tanhshrink, F.softshrink, F.rrelu)},
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus beta": lambda x: F.softplus(x, beta=2.0, threshold=3.0),
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, training=False),
    "asin": lambda x: x.clamp(-0.9, 0.9).asin(),
    "acos": lambda x: x.clamp(-0.9, 0.9).acos(),
    "atanh": lambda x: x.clamp(-0.9, 0.9).atanh(),
    "erfinv": lambda x: x.clamp(-0.9, 0.9).erfinv(),
    "tan": lambda x: x.clamp(-1, 1).tan(),
    "acosh": lambda x: (x.abs() + 1.1).acosh(),
    "lgamma": lambda x: torch.lgamma(x.abs() + 0.5),
    "log": lambda x: (x.abs() + 0.1).log(),
    "log2": lambda x: (x.abs() + 0.1).log2(),
    "log10": lambda x: (x.abs() + 0.1).log10(),
    "log1p": lambda x: x.abs().log1p(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt(),
    "reciprocal": lambda x: (x.abs() + 0.1).reciprocal(),
    "logit": lambda x: torch.logit(x.sigmoid()),
    "logit eps": lambda x: torch.logit(x, eps=0.1),
    "entr": lambda x: torch.special.entr(x.abs() + 0.1),
    "x ** 0": lambda x: x + x**0,
    "x ** 3": lambda x: x**3,
    "x ** 10": lambda x: (x / 4) ** 10,
    "x ** -2": lambda x: (x.abs() + 1) ** -2,
    "x ** 0.5": lambda x: (x.abs() + 0.1) ** 0.5,
    "x ** -0.5": lambda x: (x.abs() + 0.1) ** -0.5,
    "x ** 1.5": lambda x: x.abs() ** 1.5,
    "x ** -1.5": lambda x: (x.abs() + 1) ** -1.5,
    "1 ** x": lambda x: x * 1.0**x,
    "2 ** x": lambda x: 2**x,
    "0.3 ** x": lambda x: 0.3**x,
    "float_power": lambda x: torch.float_power(x.abs() + 0.1, 1.3).to(x.dtype),
    "through float32": lambda x: x.float().to(x.dtype),
    "clamp": lambda x: x.clamp(-1, 2),
    "clamp max": lambda x: x.clamp(max=0.5),
    "clip min": lambda x: x.clip(min=-0.5),
    "1 - x": lambda x: 1 - x,
    "2.5 / x": lambda x: 2.5 / (x.abs() + 1),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where with scalars": lambda x: x * torch.where(x > 0, x.exp(), 1.0),
    "minimum of a constant": lambda x: torch.minimum(x, torch.tensor(0.5, dtype=x.dtype)),
    "tensor constant": lambda x: x * torch.tensor(1.7),
    "zeros_like": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "x - x.trunc()": lambda x: x.sub(x.trunc()).abs().mul(1 - x.frac().abs()),
    "relu in place": lambda x: F.relu(x + 0.5, inplace=True),
    "in place": lambda x: x.clone().mul_(2).add_(1).clamp_(max=3).sigmoid_(),
    "masked_fill in place": lambda x: x.clone().masked_fill_(x < 0, 0.0),
    "mask written": lambda x: _written(x.clone()),
    "out=": lambda x: torch.mul(x, 0.5, out=torch.empty_like(x)),
    "copied": lambda x: torch.empty_like(x).copy_(x),
    "unsqueezed": lambda x: (x.unsqueeze(1) * x[:, None]).squeeze(1),
    "transposed": lambda x: (x.t() + 1).t(),
}
BINARY: dict[str, Binary] = {
    **{f.__name__: f for f in (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum)},
    **{f.__name__: f for f in (torch.fmax, torch.fmin, torch.hypot, torch.logaddexp, torch.logaddexp2)},
    "add alpha": lambda a, b: torch.add(a, b, alpha=0.5),
    "rsub alpha": lambda a, b: torch.rsub(a, b, alpha=2),
    "div": lambda a, b: a / (b.abs() + 1),
    "pow": lambda a, b: (a.abs() + 0.5) ** b.clamp(-2, 2),
    "xlogy": lambda a, b: torch.xlogy(a, b.abs() + 0.5),
    "xlog1py": lambda a, b: torch.special.xlog1py(a, b.abs()),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.3),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a.abs() + 1, value=0.3),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "lerp far": lambda a, b: torch.lerp(a, b, 0.75),
    "lerp tensor": lambda a, b: torch.lerp(a, b, b.sigmoid()),
    "clamp tensor": lambda a, b: a.clamp(min=b),
    "clamp tensors": lambda a, b: a.clamp(min=b - 1, max=b + 1),
    "clamp tensor max": lambda a, b: torch.clamp_max(a, b),
    "where": lambda a, b: torch.where(a > b, a, b * 2),
    "in place": lambda a, b: a.sigmoid().mul_(b),
    "copied": lambda a, b: torch.empty_like(a).copy_(a).add_(b, alpha=2),
    "cat": lambda a, b: torch.cat([a, b], -1).tanh().chunk(2, -1)[1],
    "stack": lambda a, b: torch.stack([a, b], -1).relu()[..., 1],
}
#: With jumps: of gate and up only, which are the same numbers wherever they are computed.
LEAVES: dict[str, Binary] = {
    "gate": lambda g, u: g,
    "up": lambda g, u: u,
    "floor": lambda g, u: g.floor(),
    "ceil": lambda g, u: g.ceil(),
    "trunc": lambda g, u: (3 * g).trunc(),
    "fix": lambda g, u: torch.fix(2 * u),
    "round": lambda g, u: (g * 2).round(),
    "round decimals": lambda g, u: torch.round(g, decimals=1),
    "frac": lambda g, u: g.frac(),
    "sign": lambda g, u: g.sign(),
    "sgn": lambda g, u: u.sgn(),
    "heaviside": lambda g, u: torch.heaviside(g, u),
    "copysign": lambda g, u: torch.copysign(g, u),
    "copysign scalar": lambda g, u: torch.copysign(g, -2.0),
    "signbit": lambda g, u: torch.where(g.signbit(), g, u),
    "fmod": lambda g, u: torch.fmod(g, u),
    "fmod scalar": lambda g, u: g.fmod(0.7),
    "remainder": lambda g, u: g % u,
    "remainder scalar": lambda g, u: torch.remainder(g, -0.7),
    # Off the jumps also where both are the same column: there float32 and float64 may differ by one.
    "floor division": lambda g, u: (3 * g + 0.1) // u,
    "floor division by a scalar": lambda g, u: g // 0.4,
    "div trunc": lambda g, u: torch.div(g, u, rounding_mode="trunc"),
    "atan2": lambda g, u: torch.atan2(g, u),
    "hardshrink": lambda g, u: F.hardshrink(g),
    "threshold": lambda g, u: F.threshold(g, 0.1, 0.2),
    "isnan": lambda g, u: torch.where(torch.isnan(g / g.relu()), u, g),
    "isinf": lambda g, u: torch.where(torch.isinf(1 / g.relu()), u, g),
    "isfinite": lambda g, u: torch.where(torch.isfinite(1 / g.relu()), u, g),
    "nan_to_num": lambda g, u: torch.nan_to_num(u / g.relu(), nan=1.0, posinf=2.0, neginf=-2.0),
    "negative base": lambda g, u: torch.nan_to_num(g**1.5, nan=-1.0, posinf=2.0, neginf=-2.0),
    "mask as a factor": lambda g, u: (g > 0) * u,
    "mask as a float": lambda g, u: (g > 0).float().to(g.dtype) * u,
    "sum of masks": lambda g, u: (g > 0).to(g.dtype) + (u > 0).to(g.dtype),
    "difference of masks": lambda g, u: (g > 0).to(g.dtype) - (u > 0).to(g.dtype),
    "negative mask": lambda g, u: -(g > 0).to(g.dtype) * u,
    "abs of a mask": lambda g, u: (g > 0).to(g.dtype).abs() * u,
    "exp of a mask": lambda g, u: (g > 0).to(g.dtype).exp(),
    "mask + 1": lambda g, u: ((g > 0) + 1) * u,
    "mask to -1 or 1": lambda g, u: ((g > 0).int() * 2 - 1) * u,
    "0.5 - mask": lambda g, u: 0.5 - (g > u).to(g.dtype),
    "masks added": lambda g, u: ((g > 0) + (u > 0)) * u,
    "masks multiplied": lambda g, u: ((g > 0) * (u > 0)) * u,
    "masks compared": lambda g, u: ((g > 0) == (u > 0)) * u,
    "maximum of a mask": lambda g, u: torch.maximum((g > 0).to(g.dtype), u),
    "number as a mask": lambda g, u: torch.where(g.floor().bool(), g, u),
    "logical_and of numbers": lambda g, u: torch.logical_and(g.floor(), u.floor()).to(g.dtype),
    "logical_xor": lambda g, u: torch.logical_xor(g > 0, u.floor()) * u,
    "not": lambda g, u: torch.where(~(g > 0), g, u),
    "logical_not": lambda g, u: torch.logical_not(g.floor()) * u,
    "and, or, not": lambda g, u: (((g > 0) & (u < 1)) | ~(g < -1)).to(g.dtype) * u,
    "xor": lambda g, u: torch.where((g > 0) ^ (u > 0), g, u),
    "masked_fill": lambda g, u: g.masked_fill(g < 0, 0.5) * u,
    "where of masks": lambda g, u: torch.where(g > 0, g > u, u > 0.5).to(g.dtype),
    "mask returned": lambda g, u: g > u,
}


def _written(x: Tensor) -> Tensor:
    x[x < 0] = 0.0
    return x


def _in_place_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, -1)
    gate.clamp_(max=1)
    up.add_(0.5)
    return gate, up


def _in_place_interleaved(x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = x.view(-1, x.size(-1) // 2, 2)
    pairs[..., 0].tanh_()
    pairs[..., 1].mul_(pairs[..., 0])
    return pairs[..., 0], pairs[..., 1]


def _halved(x: Tensor) -> list[int]:
    return [x.size(-1) // 2] * 2


#: Ways to take gate and up.
SPLITS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: x.chunk(2, -1),
    "split": lambda x: x.split(x.size(-1) // 2, dim=-1),
    "split sizes": lambda x: x.split(_halved(x), dim=1),
    "tensor_split": lambda x: x.tensor_split(2, -1),
    "hsplit": lambda x: x.hsplit(2),
    "slices": lambda x: (x[..., : x.size(-1) // 2], x[..., x.size(-1) // 2 :]),
    "narrow": lambda x: (x.narrow(-1, 0, x.size(-1) // 2), x.narrow(-1, x.size(-1) // 2, x.size(-1) // 2)),
    "view": lambda x: (lambda v: (v[..., 0, :], v[..., 1, :]))(x.view(*x.shape[:-1], 2, -1)),
    "unflatten and unbind": lambda x: x.unflatten(-1, (2, -1)).unbind(-2),
    "reshape and split": lambda x: [p.squeeze(1) for p in x.reshape(-1, 2, x.size(-1) // 2).split(1, 1)],
    "transposed": lambda x: [half.t() for half in x.t().chunk(2)],
    "interleaved": lambda x: (x[..., ::2], x[..., 1::2]),
    "interleaved, up first in code": lambda x: tuple(reversed((x[:, 1::2], x[:, 0::2]))),
    "interleaved view": lambda x: (lambda v: (v[..., 0], v[..., 1]))(x.view(*x.shape[:-1], -1, 2)),
    "interleaved unbind": lambda x: x.unflatten(-1, (-1, 2)).unbind(-1),
    "sorted apart": lambda x: x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).chunk(2, -1),
    "ungated": lambda x: (x, x),
    "clamped before": lambda x: x.clamp(-1, 1).chunk(2, -1),
    "scaled before": lambda x: (x * 0.5).unflatten(-1, (-1, 2)).unbind(-1),
    "in place": _in_place_halves,
    "interleaved in place": _in_place_interleaved,
}

EXPRESSIONS = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), inner),
        st.tuples(st.sampled_from(sorted(BINARY)), inner, inner),
    ),
    max_leaves=8,
)


def activation_of(split: str, expression: Any) -> Unary:
    """The callable that takes gate and up by ``split`` and computes ``expression``."""

    def build(node: Any, gate: Tensor, up: Tensor) -> Tensor:
        if isinstance(node, str):
            return LEAVES[node](gate, up)
        name, *operands = node
        # Clamped, so that no rounding grows until results say nothing. Masks become numbers.
        values = [build(operand, gate, up).to(gate.dtype).clamp(-4, 4) for operand in operands]
        return UNARY[name](*values) if len(values) == 1 else BINARY[name](*values)

    def activation(gate_up: Tensor) -> Tensor:
        return build(expression, *SPLITS[split](gate_up))

    return activation


#: Each function and each split by itself.
ALL: dict[str, Unary] = {
    **{name: activation_of("chunk", name) for name in LEAVES},
    **{f"{name} of gate": activation_of("chunk", ("mul", (name, "gate"), "up")) for name in UNARY},
    **{f"{name} of gate and up": activation_of("chunk", (name, "gate", "up")) for name in BINARY},
    **{f"by {split}": activation_of(split, ("sub", ("silu", "gate"), "up")) for split in SPLITS},
    "glu": F.glu,
    "glu of dim 1": lambda x: F.glu(x, 1),
}
