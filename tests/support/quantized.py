"""Quantized layers for tests: every registered scheme with several sizes, and the references that bound its error."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import compile_moe
from compile_moe import FusedMoEQuantConfig
from compile_moe.quantization import SCHEMES, QuantizedWeights, Scheme, make_scheme
from tests.support.oracle import Layer, make_layer, noise


@dataclass(frozen=True)
class Variant:
    """A scheme with sizes, as a caller names it."""

    scheme: str
    sizes: tuple[tuple[str, Any], ...] = ()
    zero_points: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.sizes)

    @property
    def made(self) -> Scheme:
        return make_scheme(self.scheme, **self.options)

    def quantize(self, w: Tensor) -> QuantizedWeights:
        return compile_moe.quantize_weights(w, self.scheme, zero_points=self.zero_points, **self.options)

    def dequantize(self, q: QuantizedWeights, dtype: torch.dtype) -> Tensor:
        return compile_moe.dequantize_weights(q.weight, self.scheme, *q[1:], **self.options, dtype=dtype)


#: Sizes to test for a parameter of a scheme; a new parameter's default is tested where it isn't listed.
SIZES: dict[str, list[Any]] = {"group_size": [16], "block_shape": [(16, 24), (128, 128)]}


def _variants() -> dict[str, Variant]:
    found = {}
    for name, scheme in sorted(SCHEMES.items()):
        choices: list[tuple[tuple[str, Any], ...]] = []
        for f in dataclasses.fields(scheme):
            choices += [((f.name, value),) for value in SIZES.get(f.name, [])]
            if f.default is None:
                choices.append(())
        for sizes in choices or [()]:
            readable = "-".join([name, *(f"{k}{v}" for k, v in sizes)]).replace(" ", "")
            found[readable] = Variant(name, sizes)
            if found[readable].made.zero_point_shape(2, 2, 512) is not None:
                found[f"{readable}-zp"] = Variant(name, sizes, zero_points=True)
    return found


VARIANTS = _variants()
#: One for each way to scale tokens, and with weights alone quantized: what differs around the GEMMs.
ONE_A_SCALING = tuple(
    {getattr(v.made.token_scaling, "per", ""): name for name, v in reversed(VARIANTS.items())}.values()
)


@dataclass
class Quantized:
    """A quantized layer; ``layer`` holds the weights that the quantized ones stand for, in float64."""

    layer: Layer
    variant: Variant
    q1: QuantizedWeights
    q2: QuantizedWeights
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None

    @property
    def args(self) -> tuple[Tensor, ...]:
        x, _, _, weights, ids = self.layer.args
        return x, self.q1.weight, self.q2.weight, weights, ids

    @property
    def scales(self) -> dict[str, Tensor | None]:
        return {
            "w1_scale": self.q1.scale,
            "w2_scale": self.q2.scale,
            "w1_zp": self.q1.zero_point,
            "w2_zp": self.q2.zero_point,
            "a1_scale": self.a1_scale,
            "a2_scale": self.a2_scale,
        }

    def config(self, **changes: Any) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig(self.variant.scheme, **(self.variant.options | self.scales | changes))

    def on_gpu(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Arguments of ``fused_experts``."""

        def moved(value: Any) -> Any:
            return value.cuda() if isinstance(value, Tensor) else value

        config = self.config(**{name: moved(scale) for name, scale in self.scales.items()})
        options = {name: moved(value) for name, value in self.layer.options.items()}
        return tuple(map(moved, self.args)), options | {"quant_config": config}

    def exact(self) -> Tensor:
        """The layer in float64, with its tokens as they are."""
        return self.layer.to(torch.float64).reference()

    def plain(self) -> Tensor:
        """The scheme in plain PyTorch in the layer's dtype, tokens quantized where the library quantizes them."""
        layer, dtype = self.layer, self.layer.hidden_states.dtype
        low = replace(layer, w1=layer.w1.to(dtype), w2=layer.w2.to(dtype))
        if self.variant.made.token_scaling is None:
            return low.reference()
        if layer.apply_router_weight_on_input:
            low.hidden_states = (layer.hidden_states * layer.topk_weights).to(dtype)
            low.topk_weights = torch.ones_like(layer.topk_weights)
            low.apply_router_weight_on_input = False
        low.hidden_states = self._fake_quantized(
            low.hidden_states, None if self.a1_scale is None else self.a1_scale.max()
        )
        rows: list[Tensor] = []
        # First all activations, whose largest may set the scale, then the layer with these.
        low.function = lambda gate_up: rows.append(layer.function(gate_up)) or layer.function(gate_up)  # type: ignore[func-returns-value]
        low.reference()
        counts = [len(r) for r in rows]
        static = None
        if self.a2_scale is not None:
            per_expert = self.a2_scale.reshape(-1).expand(len(rows))
            static = torch.cat([s.expand(n) for s, n in zip(per_expert, counts, strict=True)]).unsqueeze(1)
        quantized = list(self._fake_quantized(torch.cat(rows), static).split(counts))
        low.function = lambda gate_up: quantized.pop(0)
        return low.reference()

    def _fake_quantized(self, a: Tensor, static: Tensor | None) -> Tensor:
        """Tokens quantized and dequantized, written from the README's formula."""
        scaling = self.variant.made.token_scaling
        assert scaling is not None
        if not a.numel():
            return a
        largest = 448 if scaling.dtype is torch.float8_e4m3fn else 127
        columns = []
        width = {"tensor": a.size(1), "token": a.size(1), "group": scaling.group_size}[scaling.per]
        for part in a.float().split(width, 1):
            top = part.abs().max() if scaling.per == "tensor" else part.abs().amax(1, keepdim=True)
            scale = (top / largest).clamp(min=2.0**-126) if static is None else static
            q = (part / scale).clamp(-largest, largest)
            q = q.round() if scaling.dtype is torch.int8 else q.to(scaling.dtype).float()
            columns.append(q * scale)
        return torch.cat(columns, 1).to(a.dtype)


def make_quantized(
    variant: Variant, *, static: str = "", K: int = 48, I: int = 40, **options: Any
) -> Quantized:
    """A random layer, its weights quantized. ``static``: "", "one" or "each" for scales of tokens.

    K and I are rounded up to what the scheme needs. Where ``transposed``, the quantized weights are stored so.
    """
    multiple = variant.made.column_multiple
    transposed = options.pop("transposed", False)
    layer = make_layer(K=-(-K // multiple) * multiple, I=-(-I // multiple) * multiple, **options)
    q1, q2 = variant.quantize(layer.w1), variant.quantize(layer.w2)
    layer.w1, layer.w2 = (variant.dequantize(q, torch.float64) for q in (q1, q2))
    if transposed:
        q1, q2 = (q._replace(weight=q.weight.transpose(1, 2).contiguous().transpose(1, 2)) for q in (q1, q2))
    result = Quantized(layer, variant, q1, q2)
    if static:
        num = layer.w1.size(0) if static == "each" else 1
        result.a1_scale = torch.rand(num) / 448 + 4 / 448
        # Some experts' rows are cut off.
        result.a2_scale = torch.rand(num).square() * 2 / 448 + 0.1 / 448
    return result


def assert_as_accurate(
    result: Tensor, quantized: Quantized, factor: float = 2.0, same_scales: bool = True
) -> None:
    """Against float64, at most ``factor`` times the error of the scheme in plain PyTorch, quantized at the same points.

    As :func:`tests.support.oracle.assert_as_accurate`: in the Frobenius norm, with ``factor`` roundings on top. Most
    of that error is the tokens' quantization, which both share, so float32 must also agree with plain PyTorch
    (unless it has other scales), but for a number here and there that rounds to its other neighbour.
    """
    exact, plain = quantized.exact(), quantized.plain().double()
    dtype = quantized.layer.hidden_states.dtype
    assert result.shape == exact.shape and result.dtype is dtype
    assert torch.isfinite(result).all(), "not finite"
    if not result.numel():
        return
    factor *= noise(exact, dtype)
    error = (result.double() - exact).norm().item()
    bound = factor * ((plain - exact).norm().item() + torch.finfo(dtype).eps * exact.abs().max().item())
    assert error <= bound, f"error {error:.3e} exceeds {factor} x plain PyTorch's: {bound:.3e}"
    if dtype is torch.float32 and same_scales:
        difference = (result.double() - plain).norm().item()
        assert difference <= 0.01 * factor * plain.norm().item(), (
            f"differs from plain PyTorch by {difference:.3e}"
        )
