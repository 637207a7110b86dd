"""The experts of one token as one op: both GEMMs, activation, and finalize, without a token sort.

Compiled graphs call it in the place of the stages, where :func:`serves` says that it is faster.

Args:
    hidden_states: (1, K).
    w1: (E, N, K), w2: (E, K, I), of hidden_states' dtype, any strides.
    topk_weights: (1, topk), floating point. topk_ids, expert_map: as for ``sort_tokens``.
    w1_bias: (E, N), w2_bias: (E, K), or None.
    epilogue: program text, or "" for none.
    apply_weights: False sums without weighting.
    round_weights: topk_weights are rounded to hidden_states' dtype before they are applied.

Returns:
    (1, K) in hidden_states' dtype, contiguous. The rows between the GEMMs are rounded to it; what the experts return is
    weighted and summed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.kernels.one_token import launches as kernels
from compile_moe.ops.kernels.tiles import is_vectorized
from compile_moe.ops.layer_checks import check_biases, check_call, check_experts, check_intermediate
from compile_moe.ops.problem_size import check_same, check_weight, require, shape
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_tokens import debug_check_id_values, sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce

#: Bytes of the weights of a token's experts up to which the kernels were seen to be faster than the stages, by 4 % at
#: 302 MB (H200); at 705 MB they were so in one shape of two, and with one expert a token in none.
_MOST_BYTES = 384 * 2**20


def serves(hidden_states: Tensor, w1: Tensor, w2: Tensor, topk: int) -> bool:
    """Whether the op is the faster way for these arguments: one token, 16-bit weights whose rows lie in one piece,
    few of them. Reads shapes, strides, dtypes and devices only, and adds no guards.
    """
    num_tokens = hidden_states.size(0)
    sizes = (num_tokens, topk, *w1.shape, *w2.shape)
    if not all(isinstance(size, int) for size in sizes) or num_tokens != 1 or not hidden_states.is_cuda:
        return False
    num_bytes = topk * (w1.size(1) * w1.size(2) + w2.size(1) * w2.size(2)) * w1.element_size()
    return (
        w1.element_size() == 2
        and num_bytes > 0
        and all(w.stride(2) == 1 and is_vectorized(hidden_states, w) for w in (w1, w2))
        and 2 <= topk <= kernels.MOST_EXPERTS
        and num_bytes <= _MOST_BYTES
    )


def _check(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> None:
    check_call(hidden_states, w1, w2, topk_weights, topk_ids, expert_map, False)
    require(
        hidden_states.size(0) == 1,
        lambda: (
            f"hidden_states must be one token (1, K), got {shape(hidden_states)}; call fused_moe for more"
        ),
    )
    check_weight("w1", "(E, N, K)", w1)
    check_weight("w2", "(E, K, I)", w2)
    check_experts(hidden_states, w1, w2, topk_ids, -1, expert_map)
    check_same("hidden_states", hidden_states, w1=w1, w2=w2, w1_bias=w1_bias, w2_bias=w2_bias)
    check_biases(w1, w2, w1_bias, w2_bias)
    check_intermediate(w1, w2, epilogue, bool(epilogue) and parse(epilogue).gated)


def _outputs(hidden_states: Tensor, *_: object, **__: object) -> tuple[OutputSpec, ...]:
    return ((tuple(hidden_states.shape), hidden_states.dtype),)


def _torch(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> Tensor:
    num_experts, topk = w1.size(0), topk_ids.size(1)
    if round_weights:
        topk_weights = topk_weights.to(hidden_states.dtype)
    # As the kernels, and as the fake says: of the tokens' dtype under autocast, too.
    with torch.autocast(hidden_states.device.type, enabled=False):
        slots, offsets = sort_tokens(topk_ids, num_experts, expert_map)
        rows = gather_gemm(hidden_states, w1, slots, offsets, topk, w1_bias, epilogue)
        fused_out = scatter_gemm(rows, w2, slots, offsets, 1, topk, w2_bias)
        reduced: Tensor = weight_and_reduce(
            fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights
        )
    return reduced


def _launch(
    outputs: tuple[Tensor],
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> None:
    debug_check_id_values(topk_ids, w1.size(0), expert_map)
    program = parse(epilogue) if epilogue else None
    kernels.one_token_experts(
        outputs[0],
        hidden_states,
        w1,
        w2,
        topk_weights,
        topk_ids,
        None if expert_map is None else expert_map.contiguous(),
        w1_bias,
        w2_bias,
        program.triton_source() if program else "",
        program.layout if program else "ungated",
        apply_weights,
        round_weights,
    )


one_token_experts = define_op(
    "one_token_experts",
    "Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map=None, "
    'Tensor? w1_bias=None, Tensor? w2_bias=None, str epilogue="", bool apply_weights=True, bool round_weights=False',
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
