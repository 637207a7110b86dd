"""The experts of one token in a quantized layer, as ``one_token_experts``.

Compiled graphs call it in the place of the stages, where :func:`serves` says that it is faster.

Args:
    hidden_states: (1, K): in the dtype of scheme's tokens, or of ``out_dtype`` where the scheme leaves them alone.
    hidden_states_scale: scales of hidden_states, as ``quantize_tokens`` returns them; or None.
    w1, w1_scale, w1_zp: (E, N, K) in the scheme's layout. w2, w2_scale, w2_zp: (E, K, I) in it.
    topk_weights: (1, topk), floating point. topk_ids, expert_map: as for ``sort_tokens``.
    scheme: text of a :class:`compile_moe.quantization.Scheme`.
    out_dtype: dtype of biases and result.
    w1_bias: (E, N), w2_bias: (E, K), or None.
    epilogue: program text, or "" for none.
    apply_weights: False sums without weighting.
    round_weights: topk_weights are rounded to out_dtype before they are applied.

On CUDA, weights and quantized tokens that start at no multiple of 4 bytes take the stages, which are slower, with a
RuntimeWarning.

Returns:
    (1, K) in out_dtype, contiguous. The rows between the GEMMs are rounded to it, and quantized as tokens are where the
    scheme quantizes these; what the experts return is weighted and summed in float32 and rounded once.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.float8_support import no_float8
from compile_moe.ops.kernels.quantized.one_token import launches as kernels
from compile_moe.ops.layer_checks import check_id_space, check_intermediate, check_routing
from compile_moe.ops.problem_size import require, shape
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.ops.quantized_format import check_capability, weight_format
from compile_moe.ops.quantized_gather_gemm import quantized_gather_gemm
from compile_moe.ops.quantized_operands import (
    check_compute_dtype,
    check_output_bias,
    check_quantized_weight,
    check_tokens,
)
from compile_moe.ops.quantized_scatter_gemm import quantized_scatter_gemm
from compile_moe.ops.registry import OutputSpec, define_op
from compile_moe.ops.sort_tokens import debug_check_id_values, sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.quantization import parse_scheme
from compile_moe.quantization.rounding import LARGEST

#: Bytes that are loaded at once: views that start elsewhere would be read slowly.
_ALIGNMENT = 16
#: Rows of the weights of a token's experts, of w1 or of w2, whichever are fewer. With fewer than these, the kernels
#: were seen to be faster than the stages, by a fifth at 24576 in int4; with 32768 they were a tenth slower in int4, and
#: as fast in int8 (H200).
_ENOUGH_ROWS = 28 * 1024
#: The same where tokens are quantized: with 12288 rows they took 0.82 of the time, with 8192 as much, with 24576 1.10
#: (float8, the quantization of the token included, H200).
_ENOUGH_ROWS_OF_QUANTIZED = 16 * 1024


def serves(
    hidden_states: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    topk: int,
    scheme: str,
    out_dtype: torch.dtype,
) -> bool:
    """Whether the op is no slower a way for these arguments: one token, weights that the kernels take, too few
    rows of them for the stages. Reads shapes, strides, dtypes and devices only, and adds no guards.
    """
    num_tokens = hidden_states.size(0)
    sizes = (num_tokens, topk, *w1.shape, *w2.shape)
    if not all(isinstance(size, int) for size in sizes) or num_tokens != 1 or not hidden_states.is_cuda:
        return False
    enough = _ENOUGH_ROWS if parse_scheme(scheme).token_scaling is None else _ENOUGH_ROWS_OF_QUANTIZED
    return (
        1 <= topk <= kernels.MOST_EXPERTS
        and topk * min(w1.size(1), w2.size(1)) < enough
        and all(w.storage_offset() % _ALIGNMENT == 0 for w in (w1, w2))
        and not no_float8(w1.dtype, w1.device)
        and _are_taken(hidden_states, w1, w1_scale, w2, w2_scale, scheme, out_dtype)
    )


def _are_taken(
    hidden_states: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
) -> bool:
    form, weights = weight_format(scheme), ((w1, w1_scale), (w2, w2_scale))
    return all(kernels.serve(form, hidden_states, w, scale, out_dtype) for w, scale in weights)


def _check(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> None:
    parsed = parse_scheme(scheme)
    check_compute_dtype(out_dtype, hidden_states)
    check_routing(hidden_states, w1, w2, topk_weights, topk_ids, expert_map)
    require(
        hidden_states.size(0) == 1,
        lambda: (
            f"hidden_states must be one token (1, K), got {shape(hidden_states)}; call fused_experts for more"
        ),
    )
    check_tokens("hidden_states", "a1q_scale", hidden_states, hidden_states_scale, parsed, out_dtype)
    check_id_space(w1, topk_ids, -1, expert_map)
    check_quantized_weight("w1", "E, N, K", w1, w1_scale, w1_zp, hidden_states.size(1), parsed, out_dtype)
    check_intermediate(w1, w2, epilogue, bool(epilogue) and parse(epilogue).gated, parsed.packed)
    num_columns = w2.size(2) * parsed.packed
    check_quantized_weight("w2", "E, K, I", w2, w2_scale, w2_zp, num_columns, parsed, out_dtype)
    check_output_bias("w1_bias", w1_bias, "(E, N)", w1, out_dtype)
    check_output_bias("w2_bias", w2_bias, "(E, K)", w2, out_dtype)


def _outputs(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> tuple[OutputSpec, ...]:
    return ((tuple(hidden_states.shape), out_dtype),)


def _torch(
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> Tensor:
    num_experts, topk, scaling = w1.size(0), topk_ids.size(1), parse_scheme(scheme).token_scaling
    # A scale over all rows must not see what skipped slots hold.
    zero_skipped = scaling is not None and scaling.per == "tensor"
    rows_scale = None
    if round_weights:
        topk_weights = topk_weights.to(out_dtype)
    # As the kernels, and as the fake says: of out_dtype under autocast, too.
    with torch.autocast(hidden_states.device.type, enabled=False):
        order = sort_tokens(topk_ids, num_experts, expert_map)
        rows = quantized_gather_gemm(
            hidden_states,
            hidden_states_scale,
            w1,
            w1_scale,
            w1_zp,
            *order,
            topk,
            scheme,
            out_dtype,
            w1_bias,
            epilogue,
            zero_skipped,
        )
        if scaling is not None:
            rows, rows_scale = quantize_tokens(rows, scaling.text)
        fused_out = quantized_scatter_gemm(
            rows, rows_scale, w2, w2_scale, w2_zp, *order, 1, topk, scheme, out_dtype, w2_bias
        )
        reduced: Tensor = weight_and_reduce(
            fused_out, topk_weights, topk_ids, expert_map, num_experts, apply_weights
        )
    return reduced


def _launch(
    outputs: tuple[Tensor],
    hidden_states: Tensor,
    hidden_states_scale: Tensor | None,
    w1: Tensor,
    w1_scale: Tensor,
    w1_zp: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor,
    w2_zp: Tensor | None,
    topk_weights: Tensor,
    topk_ids: Tensor,
    scheme: str,
    out_dtype: torch.dtype,
    expert_map: Tensor | None = None,
    w1_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    epilogue: str = "",
    apply_weights: bool = True,
    round_weights: bool = False,
) -> None:
    debug_check_id_values(topk_ids, w1.size(0), expert_map)
    check_capability("quantized_one_token_experts", w1, scheme)
    is_taken = _are_taken(hidden_states, w1, w1_scale, w2, w2_scale, scheme, out_dtype)
    if not is_taken or not 1 <= topk_ids.size(1) <= kernels.MOST_EXPERTS:
        raise NotImplementedError(
            f"compile_moe::quantized_one_token_experts: got a token in {hidden_states.dtype} for {topk_ids.size(1)} "
            f"experts, a result in {out_dtype}, and in scheme {scheme} w1 {shape(w1)} with strides {w1.stride()} and "
            f"w2 {shape(w2)} with strides {w2.stride()}, scales in {w1_scale.dtype} and {w2_scale.dtype}; accepted "
            "are 16-bit tokens, or quantized ones for 16-bit results, in one piece (bfloat16 for mxfp4) for 1 to "
            f"{kernels.MOST_EXPERTS} experts, weights in bytes or nibbles, multiples of 16 rows, in one piece each and "
            "a multiple of 16 bytes long, with a scale an expert or a row or, in the tokens' dtype or mxfp4's, for "
            "each 2^n columns from 32 on, or, where tokens are quantized, for each 128; call fused_experts"
        )
    in_words = {"w1": w1, "w2": w2}
    if hidden_states_scale is not None:
        in_words["hidden_states"] = hidden_states
    odd = [name for name, t in in_words.items() if t.data_ptr() % kernels.WORD]
    if odd:
        # A graph that was compiled for others may bring such.
        warnings.warn(
            f"compile_moe::quantized_one_token_experts: {odd[0]} starts at no multiple of {kernels.WORD} bytes, where "
            "its kernels can't read it: slower ones compute this; give it memory of its own (clone)",
            RuntimeWarning,
            stacklevel=2,
        )
        reduced = _torch(
            hidden_states,
            hidden_states_scale,
            w1,
            w1_scale,
            w1_zp,
            w2,
            w2_scale,
            w2_zp,
            topk_weights,
            topk_ids,
            scheme,
            out_dtype,
            expert_map,
            w1_bias,
            w2_bias,
            epilogue,
            apply_weights,
            round_weights,
        )
        outputs[0].copy_(reduced)
        return
    program = parse(epilogue) if epilogue else None
    scaling = parse_scheme(scheme).token_scaling
    kernels.quantized_one_token_experts(
        outputs[0],
        hidden_states,
        hidden_states_scale,
        w1,
        w1_scale,
        w1_zp,
        w2,
        w2_scale,
        w2_zp,
        topk_weights,
        topk_ids,
        None if expert_map is None else expert_map.contiguous(),
        weight_format(scheme),
        "16 bits" if scaling is None else scaling.per,
        0.0 if scaling is None else LARGEST[scaling.dtype],
        w1_bias,
        w2_bias,
        program.triton_source() if program else "",
        program.layout if program else "ungated",
        apply_weights,
        round_weights,
    )


quantized_one_token_experts = define_op(
    "quantized_one_token_experts",
    "Tensor hidden_states, Tensor? hidden_states_scale, Tensor w1, Tensor w1_scale, Tensor? w1_zp, Tensor w2, "
    "Tensor w2_scale, Tensor? w2_zp, Tensor topk_weights, Tensor topk_ids, str scheme, ScalarType out_dtype, "
    "Tensor? expert_map=None, Tensor? w1_bias=None, Tensor? w2_bias=None, "
    'str epilogue="", bool apply_weights=True, bool round_weights=False',
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
