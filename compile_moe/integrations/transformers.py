"""The layer as an experts implementation of Hugging Face transformers.

>>> import compile_moe.integrations.transformers as integration
>>> integration.register()                                                              # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(..., experts_implementation=integration.NAME)    # doctest: +SKIP

or, for a model that is there already, ``model.set_experts_implementation("compile_moe")``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compile_moe.experts import TritonExperts
from compile_moe.fused_experts import fused_experts
from compile_moe.modular_kernel import FusedMoEModularKernel
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP

#: What to give as ``experts_implementation``.
NAME = "compile_moe"

_REQUIREMENT = "transformers >= 5.17; install it by: pip install 'compile-moe[transformers]'"


def register() -> None:
    """Add ``experts_implementation="compile_moe"`` to transformers. Calling it again changes nothing.

    Models with float weights then run every experts class that transformers decorates with
    ``use_experts_implementation`` through :func:`compile_moe.fused_experts`. Those that transformers quantizes to
    FP8 raise NotImplementedError when they run.

    Raises:
        ImportError: transformers is missing, or has no experts interface.
    """
    moe = _import("transformers.integrations.moe")
    fp8 = _import("transformers.integrations.finegrained_fp8")
    try:
        interfaces = (moe.ExpertsInterface, fp8.FP8ExpertsInterface)
    except AttributeError as error:
        raise ImportError(f"{error}; compile_moe needs {_REQUIREMENT}") from error
    for interface, forward in zip(interfaces, (experts_forward, fp8_experts_forward), strict=True):
        interface.register(NAME, forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module; transformers calls it in place of the module's own.

    Args:
        self: the module. Attributes read: has_gate, has_bias, is_transposed, gate_up_proj or up_proj, down_proj, their
            biases, as the activation ``_apply_gate`` (which knows the layout of gate and up) or ``act_fn``, and, where
            has_post_expert_norm is set, post_expert_norm.
        hidden_states: (M, K), floating point.
        top_k_index: (M, topk), int32 or int64. The id num_experts skips its slot.
        top_k_weights: (M, topk), floating point.

    Returns:
        (M, K) in hidden_states' dtype.

    Raises:
        TypeError: weights that are not plain floating-point tensors.
        ValueError: shapes that don't fit together.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    w1, w2 = _weight(self, name), _weight(self, "down_proj")
    w1_bias = _weight(self, f"{name}_bias") if self.has_bias else None
    w2_bias = _weight(self, "down_proj_bias") if self.has_bias else None
    if self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    activation = self._apply_gate if self.has_gate else self.act_fn
    # A norm that keeps float32 hands over more precision than the weights have.
    given = hidden_states.to(w1.dtype), w1, w2, top_k_weights, top_k_index
    if getattr(self, "has_post_expert_norm", False):
        parts = _PostExpertNorm(self.post_expert_norm), TritonExperts(w1_bias=w1_bias, w2_bias=w2_bias)
        result = FusedMoEModularKernel(*parts)(*given, activation=activation)
    else:
        result = fused_experts(*given, activation=activation, w1_bias=w1_bias, w2_bias=w2_bias)
    return result.to(hidden_states.dtype)


class _PostExpertNorm(MoEPrepareAndFinalizeNoEP):
    """Normalises each expert's output before the weighted sum (transformers newer than 5.17)."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any, **kwargs: Any) -> None:
        super().finalize(output, self.norm(fused_expert_output), *args, **kwargs)


def fp8_experts_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Refusal of modules whose experts transformers quantized to FP8."""
    raise NotImplementedError(
        f"{type(self).__name__} holds FP8 weights, which this integration does not run yet; load the model with "
        "FineGrainedFP8Config(dequantize=True), or choose another experts_implementation ('grouped_mm', 'eager')"
    )


def _weight(module: Any, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{type(module).__name__}.{name} must be a tensor, got {type(weight).__name__}; compile_moe runs experts "
            "with the stacked weights of transformers' use_experts_implementation; choose another "
            "experts_implementation for this model"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise TypeError(
            f"{type(module).__name__}.{name} must be bfloat16, float16, float32 or float64, got {weight.dtype}; "
            "this integration does not run quantized experts yet: load the model dequantized, or choose another "
            "experts_implementation"
        )
    return weight


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; compile_moe.integrations.transformers needs {_REQUIREMENT}") from error
