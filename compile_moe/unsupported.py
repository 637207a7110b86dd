"""Refusals of what this version can't do, by name."""

from __future__ import annotations

from torch import Tensor


def refuse_scales(class_name: str, kind: str, **scales: Tensor | None) -> None:
    """Raise ValueError naming the scales and zero points that were given."""
    given = [name for name, value in scales.items() if value is not None]
    if given:
        raise ValueError(
            f"{class_name} runs unquantized layers and takes no {', '.join(given)}; pass None, or use "
            f"{kind} that handles the quantization"
        )


def refuse_quant_config(quant_config: object) -> None:
    if quant_config is not None:
        raise ValueError(
            f"quantized layers are not supported by this version: quant_config must be None, got {quant_config!r}"
        )
