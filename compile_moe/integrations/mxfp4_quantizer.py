"""How transformers loads mxfp4 checkpoints (gpt-oss) for our experts: their blocks and scales as they are stored.

This module needs transformers; only ``register`` imports it.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from compile_moe.integrations.experts_module import NAME, is_experts
from compile_moe.integrations.quantized_experts import ExpertsQuantization, declare_module, quantize_module

_QUANTIZATION = ExpertsQuantization("mxfp4_w4a16")
#: What transformers converts, and how it finds it.
_EXPERTS_CLASS = "GptOssExperts"


class Mxfp4Quantizer(Mxfp4HfQuantizer):
    """Transformers' mxfp4 quantizer, but models with our experts need neither its kernels nor its modules."""

    #: Whether the model that is loaded is ours; known once it is built.
    runs_compile_moe = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self._environment = args, kwargs

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        chosen = model.config._experts_implementation
        self.runs_compile_moe = chosen == NAME and not self.quantization_config.dequantize
        if not self.runs_compile_moe:
            args, environment = self._environment
            super().validate_environment(*args, **environment)
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        found = self._experts(model)
        if self.pre_quantized:
            for experts in found:
                declare_module(experts, _QUANTIZATION)
                # The model's own initialisation knows float weights only.
                experts._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.runs_compile_moe and not self.pre_quantized:
            for experts in self._experts(model):
                quantize_module(experts, _QUANTIZATION)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _experts(self, model: Any) -> list[Any]:
        skipped = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, model._keep_in_fp32_modules
        )
        found = {
            name: module
            for name, module in model.named_modules()
            if is_experts(module) and should_convert_module(name, skipped)
        }
        for name, module in found.items():
            if type(module).__name__ != _EXPERTS_CLASS:
                raise ValueError(
                    f"transformers' mxfp4 is for {_EXPERTS_CLASS}, got {type(module).__name__} at {name}, whose "
                    "checkpoints would not load; load the model without a quantization_config and give it to "
                    f"compile_moe.integrations.transformers.quantize_experts(model, {_QUANTIZATION.scheme!r})"
                )
        return list(found.values())

    def get_weight_conversions(self) -> Any:
        return [] if self.runs_compile_moe else super().get_weight_conversions()

    def update_weight_conversions(self, weight_conversions: Any, *args: Any) -> Any:
        if self.runs_compile_moe:
            return weight_conversions
        return super().update_weight_conversions(weight_conversions, *args)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        return (None, {}) if self.runs_compile_moe else super().get_state_dict_and_metadata(model)

    @property
    def is_compileable(self) -> bool:
        return self.runs_compile_moe or super().is_compileable
