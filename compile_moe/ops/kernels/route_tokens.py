"""Scores of all experts, the topk best of each token and their weights, in one launch and without atomics.

Scores are compared as integers that order like the floats, so that NaN has its place (the greatest) and a maximum is
found exactly. The best expert is taken topk times; the lowest id wins a tie.
"""

from __future__ import annotations

import struct
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from compile_moe.ops.kernels.launch import Launch, Plan, launch, pointer_key

# Below the keys of all floats: an expert that is taken, or none; and, above it, one that may not be chosen.
_NO_KEY = tl.constexpr(-(2**31))
_NAN_KEY = tl.constexpr(2**31 - 1)
_HIDDEN_KEY = -(2**31) + 1
#: Experts that one warp holds in registers without spilling.
_EXPERTS_PER_WARP = 1024


@triton.jit
def _key(x):
    """int32 that orders like float32: -0 equals 0, NaN is the greatest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), _NAN_KEY)


@triton.jit
def _value(key):
    """float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def _best(key, expert, NUM_EXPERTS: tl.constexpr):
    """Along the last axis: the largest key, the lowest expert that has it, and where that is."""
    axis: tl.constexpr = len(key.shape) - 1
    top = tl.max(key, axis, keep_dims=True)
    first = tl.min(tl.where(key == top, expert, NUM_EXPERTS), axis, keep_dims=True)
    return top, first, expert == first


@triton.jit
def _limit_to_groups(
    key,  # (ROWS, GROUPS_PAD * SIZE_PAD)
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    EXCLUDED_KEY: tl.constexpr,
):
    """Give EXCLUDED_KEY to the experts outside the TOPK_GROUP groups whose two best scores sum up highest."""
    ROWS: tl.constexpr = key.shape[0]
    members = tl.reshape(key, (ROWS, GROUPS_PAD, SIZE_PAD))
    top, _, is_top = _best(members, tl.arange(0, SIZE_PAD)[None, None, :], SIZE_PAD)
    score = _value(top)
    if GROUP_SIZE > 1:
        second = tl.max(tl.where(is_top, _NO_KEY, members), 2, keep_dims=True)
        score += _value(second)
    group = tl.arange(0, GROUPS_PAD)[None, :]
    group_key = tl.where(group < NUM_GROUPS, _key(tl.reshape(score, (ROWS, GROUPS_PAD))), _NO_KEY)
    chosen = tl.zeros((ROWS, GROUPS_PAD), dtype=tl.int32)
    for _ in range(TOPK_GROUP):
        _, _, here = _best(group_key, group, NUM_GROUPS)
        chosen = tl.where(here, 1, chosen)
        group_key = tl.where(here, _NO_KEY, group_key)
    # Padding stays below what is excluded: only experts may be chosen.
    excluded = (tl.reshape(chosen, (ROWS, GROUPS_PAD, 1)) == 0) & (members != _NO_KEY)
    return tl.reshape(tl.where(excluded, EXCLUDED_KEY, members), (ROWS, GROUPS_PAD * SIZE_PAD))


@triton.jit
def route_rows(
    topk_weights_ptr,  # (M, topk), contiguous
    topk_ids_ptr,  # (M, topk), contiguous
    logits_ptr,  # (M, E)
    bias_ptr,  # (E,)
    row,  # (ROWS, 1)
    num_tokens,
    scaling_factor,
    epsilon,
    stride_lm,
    stride_le,
    stride_be,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    EXCLUDED_KEY: tl.constexpr,
    TOPK_PAD: tl.constexpr,
):
    """Route the tokens ``row``; return which expert (1, P) each position is of, NUM_EXPERTS where it is of none, and
    for each (ROWS, P) how many better ones its token has chosen, -1 where it is not chosen itself.
    """
    ROWS: tl.constexpr = row.shape[0]
    GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    position = tl.arange(0, GROUPS_PAD * SIZE_PAD)[None, :]
    member = position % SIZE_PAD
    expert = position // SIZE_PAD * GROUP_SIZE + member
    is_expert = (member < GROUP_SIZE) & (expert < NUM_EXPERTS)
    expert = tl.where(is_expert, expert, NUM_EXPERTS)
    is_token = row < num_tokens
    row_ptr = logits_ptr + row.to(tl.int64) * stride_lm
    logits = tl.load(row_ptr + expert.to(tl.int64) * stride_le, mask=is_token & is_expert, other=0.0).to(
        tl.float32
    )
    if SCORING == "softmax":
        top = tl.max(tl.where(is_expert, logits, float("-inf")), 1, keep_dims=True)
        score = tl.where(is_expert, libdevice.exp(logits - top), 0.0)
        total = tl.sum(score, 1, keep_dims=True)
        score = tl.div_rn(score, tl.broadcast_to(total, score.shape))
    elif SCORING == "sigmoid":
        score = _sigmoid(logits)
    else:
        score = logits
    if HAS_BIAS:
        score += tl.load(bias_ptr + expert * stride_be, mask=is_expert, other=0.0).to(tl.float32)
    key = tl.where(is_expert, _key(score), _NO_KEY)
    if TOPK_GROUP < NUM_GROUPS:
        key = _limit_to_groups(key, NUM_GROUPS, TOPK_GROUP, GROUP_SIZE, GROUPS_PAD, SIZE_PAD, EXCLUDED_KEY)

    column = tl.arange(0, TOPK_PAD)[None, :]
    ids = tl.zeros((ROWS, TOPK_PAD), dtype=tl.int32)
    chosen_key = tl.zeros((ROWS, TOPK_PAD), dtype=tl.int32)
    order = tl.full((ROWS, GROUPS_PAD * SIZE_PAD), -1, dtype=tl.int32)
    for j in range(TOPK):
        best_key, first, here = _best(key, expert, NUM_EXPERTS)
        ids = tl.where(column == j, first, ids)
        chosen_key = tl.where(column == j, best_key, chosen_key)
        order = tl.where(here, j, order)
        key = tl.where(here, _NO_KEY, key)

    in_row = column < TOPK
    mask = is_token & in_row
    if HAS_BIAS or SCORING == "sigmoid":
        # The keys include the bias, or are those of excluded experts.
        chosen = tl.load(row_ptr + ids.to(tl.int64) * stride_le, mask=mask, other=0.0).to(tl.float32)
        if SCORING == "sigmoid":
            weight = _sigmoid(chosen)
        else:
            weight = libdevice.exp(chosen - top)
            weight = tl.div_rn(weight, tl.broadcast_to(total, weight.shape))
    else:
        weight = _value(chosen_key)
    if SCORING == "topk_softmax":
        top = tl.max(tl.where(in_row, weight, float("-inf")), 1, keep_dims=True)
        weight = tl.where(in_row, libdevice.exp(weight - top), 0.0)
        weight = tl.div_rn(weight, tl.broadcast_to(tl.sum(weight, 1, keep_dims=True), weight.shape))
    if RENORMALIZE:
        chosen_total = tl.sum(tl.where(in_row, weight, 0.0), 1, keep_dims=True) + epsilon
        weight = tl.div_rn(weight, tl.broadcast_to(chosen_total, weight.shape))
    out = row.to(tl.int64) * TOPK + column
    tl.store(topk_weights_ptr + out, weight * scaling_factor, mask=mask)
    tl.store(topk_ids_ptr + out, ids.to(tl.int64), mask=mask)
    return expert, order


@triton.jit(do_not_specialize=["num_tokens", "scaling_factor", "epsilon"])
def route_tokens_kernel(
    topk_weights_ptr,
    topk_ids_ptr,
    logits_ptr,
    bias_ptr,
    num_tokens,
    scaling_factor,
    epsilon,
    stride_lm,
    stride_le,
    stride_be,
    SCORING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    EXCLUDED_KEY: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    route_rows(
        topk_weights_ptr,
        topk_ids_ptr,
        logits_ptr,
        bias_ptr,
        row,
        num_tokens,
        scaling_factor,
        epsilon,
        stride_lm,
        stride_le,
        stride_be,
        SCORING,
        HAS_BIAS,
        RENORMALIZE,
        NUM_EXPERTS,
        TOPK,
        NUM_GROUPS,
        TOPK_GROUP,
        GROUPS_PAD,
        SIZE_PAD,
        EXCLUDED_KEY,
        TOPK_PAD,
    )


def _key_of(score: float) -> int:
    """What :func:`_key` makes of a number."""
    (bits,) = struct.unpack("i", struct.pack("f", score or 0.0))
    return int(bits ^ ((bits >> 31) & 0x7FFFFFFF))


def routing_constants(
    num_experts: int,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    excluded_score: float | None = None,
) -> dict[str, Any]:
    """The constexpr parameters of :func:`route_rows`."""
    # Groups that limit nothing are one group.
    num_groups, topk_group = (num_expert_group, topk_group) if topk_group < num_expert_group else (1, 1)
    groups_pad = triton.next_power_of_2(num_groups)
    return {
        "SCORING": scoring,
        "HAS_BIAS": correction_bias is not None,
        "RENORMALIZE": renormalize,
        "NUM_EXPERTS": num_experts,
        "TOPK": topk,
        "NUM_GROUPS": num_groups,
        "TOPK_GROUP": topk_group,
        "GROUPS_PAD": groups_pad,
        # At least a lane an expert.
        "SIZE_PAD": max(triton.next_power_of_2(num_experts // num_groups), 32 // groups_pad),
        "EXCLUDED_KEY": _HIDDEN_KEY if excluded_score is None else _key_of(excluded_score),
        "TOPK_PAD": triton.next_power_of_2(topk),
    }


def routing_arguments(
    topk_weights: Tensor,
    topk_ids: Tensor,
    router_logits: Tensor,
    correction_bias: Tensor | None,
    routed_scaling_factor: float,
    epsilon: float = 1e-20,
) -> tuple[Any, ...]:
    """The arguments of both kernels that choose experts."""
    m, num_experts = router_logits.shape
    # The stride of a dimension of size 1 means nothing, but would select another specialization.
    stride_lm = router_logits.stride(0) if m > 1 else num_experts
    stride_le = router_logits.stride(1) if num_experts > 1 else 1
    bias, stride_be = (
        (router_logits, 1) if correction_bias is None else (correction_bias, correction_bias.stride(0))
    )
    factors = float(routed_scaling_factor), float(epsilon)
    return (topk_weights, topk_ids, router_logits, bias, m, *factors, stride_lm, stride_le, stride_be)


def routing_key(arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What selects compiled code, for a :class:`Plan`."""
    return (*map(pointer_key, arguments[:4]), *arguments[7:10], *constants.values())


def launch_for(arguments: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
    num_positions = constants["GROUPS_PAD"] * constants["SIZE_PAD"]
    num_warps = min(8, max(1, num_positions // _EXPERTS_PER_WARP))
    return Launch(
        route_tokens_kernel, (arguments[4],), arguments, {**constants, "ROWS": 1, "num_warps": num_warps}
    )


def route_tokens(topk_weights: Tensor, topk_ids: Tensor, *arguments: Any) -> None:
    """Launch the router into topk_weights (M, topk) float32 and topk_ids (M, topk) int64, both contiguous.

    Args: then those of the op.
    """
    launch(_plan, topk_weights, topk_ids, *arguments)


def _plan(
    topk_weights: Tensor,
    topk_ids: Tensor,
    router_logits: Tensor,
    topk: int,
    scoring: str,
    correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    epsilon: float = 1e-20,
    excluded_score: float | None = None,
) -> Plan:
    constants = routing_constants(
        router_logits.size(1),
        topk,
        scoring,
        correction_bias,
        num_expert_group,
        topk_group,
        renormalize,
        excluded_score,
    )
    arguments = routing_arguments(
        topk_weights, topk_ids, router_logits, correction_bias, routed_scaling_factor, epsilon
    )
    only = launch_for(arguments, constants)
    return Plan(("route_tokens", *routing_key(arguments, constants)), (only,), lambda: (only,))
