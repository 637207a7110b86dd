"""The layer as an experts implementation of Hugging Face transformers.

>>> import compile_moe.integrations.transformers as integration
>>> integration.register()                                                              # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(..., experts_implementation=integration.NAME)    # doctest: +SKIP

or, for a model that is there already, ``model.set_experts_implementation("compile_moe")``.

>>> integration.quantize_experts(model, "int4_w4a16", group_size=32)                    # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from compile_moe.integrations.experts_module import (
    NAME,
    Operands,
    float_weights,
    is_experts,
    refuse_save_pretrained,
    run_experts,
)
from compile_moe.integrations.fp8_experts import fp8_experts_forward
from compile_moe.integrations.quantized_experts import (
    ExpertsQuantization,
    check_module,
    quantization_of,
    quantize_module,
    quantized_operands,
)
from compile_moe.quant_config import find_scheme

__all__ = ["NAME", "experts_forward", "fp8_experts_forward", "quantize_experts", "register"]

_REQUIREMENT = "transformers >= 5.17; install it by: pip install 'compile-moe[transformers]'"


def register() -> None:
    """Add ``experts_implementation="compile_moe"`` to transformers. Calling it again changes nothing.

    Models then run every experts class that transformers decorates with ``use_experts_implementation`` through
    :func:`compile_moe.fused_experts`, also where it quantizes them to FP8 (:func:`fp8_experts_forward`). mxfp4
    checkpoints (gpt-oss) load with their experts as they are stored, without transformers' kernels for them.

    Raises:
        ImportError: transformers is missing, or has no experts interface.
    """
    moe = _import("transformers.integrations.moe")
    fp8 = _import("transformers.integrations.finegrained_fp8")
    try:
        interfaces = (moe.ExpertsInterface, fp8.FP8ExpertsInterface)
        quantizers = _import("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
    except AttributeError as error:
        raise ImportError(f"{error}; compile_moe needs {_REQUIREMENT}") from error
    for interface, forward in zip(interfaces, (experts_forward, fp8_experts_forward), strict=True):
        interface.register(NAME, forward)
    quantizers["mxfp4"] = _import("compile_moe.integrations.mxfp4_quantizer").Mxfp4Quantizer


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module; transformers calls it in place of the module's own.

    Args:
        self: the module. Attributes read: has_gate, has_bias, is_transposed, gate_up_proj or up_proj, down_proj (or
            what :func:`quantize_experts` left of these), their biases, as the activation ``_apply_gate`` (which knows
            the layout of gate and up) or ``act_fn``, and, where has_post_expert_norm is set, post_expert_norm.
        hidden_states: (M, K), floating point.
        top_k_index: (M, topk), int32 or int64. The id num_experts skips its slot.
        top_k_weights: (M, topk), floating point.

    Returns:
        (M, K) in hidden_states' dtype.

    Raises:
        TypeError: weights that are not plain floating-point tensors, or quantized by something else.
        ValueError: shapes that don't fit together.
    """
    quantization = quantization_of(self)
    if quantization is None:
        w1, w2 = float_weights(self)
        operands = Operands(w1, w2, None, w1.dtype)
    else:
        operands = quantized_operands(self, quantization, hidden_states)
    return run_experts(self, operands, hidden_states, top_k_index, top_k_weights)


def quantize_experts(
    model: Any,
    scheme: str,
    *,
    block_shape: Sequence[int] | None = None,
    group_size: int | None = None,
    zero_points: bool = False,
) -> None:
    """Quantize the experts of a model in place, one module after the other, and choose our implementation for it.

    The weights become parameters in the scheme's layout and under other names: ``state_dict`` holds them, and
    ``load_state_dict`` takes them on a model that was quantized alike. Only our implementation runs them: with another
    one, such as "eager", a forward raises AttributeError. ``save_pretrained`` has no format for them, and raises
    RuntimeError from then on. Don't call ``model.to(dtype)`` afterwards, which casts float8 weights and scales too.

    Args:
        model: a PreTrainedModel with float experts of ``use_experts_implementation``.
        scheme, block_shape, group_size: as for :class:`compile_moe.FusedMoEQuantConfig`.
        zero_points: as for :func:`compile_moe.quantize_weights`.

    Raises:
        ValueError, TypeError: no such scheme, no such experts, experts that are quantized already, or sizes that don't
            divide. The model is then as it was.
    """
    find_scheme(scheme, block_shape, group_size)
    experts = [module for module in model.modules() if is_experts(module)]
    if not experts:
        raise ValueError(
            f"{type(model).__name__} has no experts that transformers dispatches by experts_implementation"
        )
    quantization = ExpertsQuantization(
        scheme, None if block_shape is None else tuple(block_shape), group_size
    )
    for module in experts:
        check_module(module, quantization, zero_points)
    register()
    model.set_experts_implementation(NAME)
    refuse_save_pretrained(model, _save_pretrained)
    for module in experts:
        quantize_module(module, quantization, zero_points)


def _save_pretrained(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "save_pretrained has no format for experts that quantize_experts quantized: what it writes would load with "
        "other weights. Save model.state_dict() with torch.save instead, and give it to load_state_dict of a model "
        "that was made from the same config and quantized by quantize_experts with the same arguments; or save the "
        "model before its experts are quantized, and quantize them each time after from_pretrained"
    )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; compile_moe.integrations.transformers needs {_REQUIREMENT}") from error
