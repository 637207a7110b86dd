"""The ``triton_kernels`` of Triton's repository: ``topk``, ``matmul`` twice, ``reduce``; written against Triton 3.8's.

Timed whole: ``topk`` with the chosen experts given, which builds the sort's metadata, GEMM with the activation fused,
GEMM that scatters weighted rows, sum. Weights are (E, K, N) and (E, I, K), views with the inner dimension contiguous;
w1 with gate and up alternating. Its own ``swiglu_fn`` is gpt-oss's; silu is a function of the same form.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from compile_moe.cli.contestants.contestant import Contestant, Inputs, load, versions_of
from compile_moe.cli.contestants.expert_weights import ExpertWeights, interleaved
from compile_moe.ops.named_activations import SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT

# The package of this name on PyPI is another one.
_INSTALL = (
    "pip install git+https://github.com/triton-lang/triton#subdirectory=python/triton_kernels (3.8 or later)"
)


@triton.jit
def silu_and_mul(gate_up):  # type: ignore[no-untyped-def]
    gate, up = tl.split(tl.reshape(gate_up, (gate_up.shape[0], gate_up.shape[1] // 2, 2)))
    return gate * tl.sigmoid(gate) * up


def make(weights: ExpertWeights) -> Contestant:
    kernels = load("triton_kernels.matmul", _INSTALL)
    specs = load("triton_kernels.specialize", _INSTALL).FnSpecs
    topk = load("triton_kernels.topk", _INSTALL).topk
    metadata = load("triton_kernels.tensor", _INSTALL).make_ragged_tensor_metadata
    reduce = load("triton_kernels.reduce", _INSTALL).reduce
    swiglu_fn = load("triton_kernels.swiglu", _INSTALL).swiglu_fn
    weights.require(("silu", "swigluoai"), (torch.bfloat16, torch.float16))
    is_silu = weights.activation == "silu"
    if is_silu:
        activation = kernels.FusedActivation(specs("silu_and_mul", silu_and_mul, (), reduction_n=2), ())
    else:
        swiglu = specs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2)
        activation = kernels.FusedActivation(swiglu, (SWIGLUOAI_ALPHA, SWIGLUOAI_LIMIT))
    num_experts = weights.w1.size(0)
    w1 = (interleaved(weights.w1) if is_silu else weights.w1.contiguous()).transpose(1, 2)
    w2 = weights.w2.contiguous().transpose(1, 2)
    b1, b2 = (None if bias is None else bias.float() for bias in (weights.w1_bias, weights.w2_bias))
    if b1 is not None and is_silu:
        b1 = interleaved(b1)

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        """The routing weights stand at their experts' columns, as a router's scores do."""
        hidden_states, ids, topk_weights = inputs
        scores = torch.zeros((ids.size(0), num_experts), device=ids.device).scatter(
            1, ids, topk_weights.float()
        )
        return hidden_states, scores, ids.to(torch.int16)

    def call(hidden_states: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        num_tokens, num_chosen = ids.shape
        routed: Any = topk(scores, num_chosen, apply_softmax=False, y_indx=ids)
        order = routed.mask_metadata.col_sorted_indx
        ragged = metadata(routed.mask_metadata.col_sum, order.size(0))
        rows = kernels.matmul(
            hidden_states,
            w1,
            b1,
            a_ragged_metadata=ragged,
            gather_indx=order // num_chosen,
            fused_activation=activation,
        )
        scattered = kernels.matmul(
            rows,
            w2,
            b2,
            a_ragged_metadata=ragged,
            scatter_indx=order,
            gammas=routed.vals.flatten()[order],
        )
        return reduce(scattered.view(num_tokens, num_chosen, -1), dim=1)[0]

    return Contestant(arguments, call, versions=versions_of("triton_kernels"))
