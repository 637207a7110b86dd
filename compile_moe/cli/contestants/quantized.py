"""Our experts with quantized weights, called by the scheme: the model's weights quantized, with the scheme's default
sizes. What they compute is compared with the same scheme in plain PyTorch, not with the unquantized experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import compile_moe
from compile_moe.cli.contestants.contestant import Contestant, Inputs, Unavailable
from compile_moe.cli.contestants.expert_weights import ExpertWeights
from compile_moe.quantization import SCHEMES

NAMES = tuple(sorted(SCHEMES))
_MOST_ERROR = 2e-2
#: Between the GEMMs, numbers that differ in their last bit may be quantized to different neighbours: in float8, a 16th
#: apart. Of the worst token of a batch, plain PyTorch in bfloat16 and the CPU ops differ by 3.4e-2 (K 2048, I 768).
_MOST_ERROR_OF_QUANTIZED_TOKENS = 6e-2


def make(scheme: str, weights: ExpertWeights) -> Contestant:
    """The experts of ``weights`` in a scheme, compiled.

    Raises:
        Unavailable: sizes that the scheme doesn't divide.
    """
    try:
        q1, q2 = (compile_moe.quantize_weights(w, scheme) for w in (weights.w1, weights.w2))
    except ValueError as error:
        raise Unavailable(str(error)) from error
    config = compile_moe.FusedMoEQuantConfig(scheme, w1_scale=q1.scale, w2_scale=q2.scale)
    biases: dict[str, Any] = {"w1_bias": weights.w1_bias, "w2_bias": weights.w2_bias}
    plain = compile_moe.FusedMoEModularKernel(
        compile_moe.MoEPrepareAndFinalizeNoEP(config), compile_moe.TorchExperts(**biases, quant_config=config)
    )

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        """One compile serves all numbers of tokens but one."""
        x, ids, topk_weights = inputs
        if x.size(0) > 1:
            for argument in inputs:
                torch._dynamo.mark_dynamic(argument, 0)
        return x, q1.weight, q2.weight, topk_weights, ids

    def experts(*given: Tensor) -> Tensor:
        return compile_moe.fused_experts(*given, activation=weights.function, quant_config=config, **biases)

    def reference(*given: Tensor) -> Tensor:
        return plain(*given, activation=weights.function)

    tensors = (q1.weight, q1.scale, q2.weight, q2.scale)
    return Contestant(
        arguments,
        torch.compile(experts, fullgraph=True),
        reference=reference,
        most_error=_MOST_ERROR
        if SCHEMES[scheme]().token_scaling is None
        else _MOST_ERROR_OF_QUANTIZED_TOKENS,
        expert_bytes=sum(t[0].numel() * t.element_size() for t in tensors),
    )
