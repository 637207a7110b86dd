"""Problem size of the MoE layer and the checks on its arguments that every op and the API share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ID_DTYPES = (torch.int32, torch.int64)


def require(condition: bool, message: Callable[[], str]) -> None:
    """Raise ValueError with ``message()`` unless ``condition``.

    A condition on an unbacked size becomes a run-time assertion of the graph. In a conjunction it must stand last:
    ``and`` asks every operand but the last for its truth.
    """
    if condition is True:
        return
    if not torch.compiler.is_dynamo_compiling():
        torch._check_with(ValueError, condition, message)
        return
    # Here, because it costs half a second; while dynamo traces, it is there.
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    # Dynamo takes messages of run-time assertions only if they are constant.
    if not guard_or_true(condition):
        raise ValueError(message())
    torch._check(condition)


def require_type(condition: bool, message: Callable[[], str]) -> None:
    if not condition:
        raise TypeError(message())


def shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _moe_problem_size(a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor) -> tuple[int, int, int, int, int]:
    """Problem size (E, M, N, K, topk) of an MoE layer.

    E and N come from w1, K from ``w2.size(1)`` (never from a trailing dimension, which packed formats such as
    int4 halve), M from ``a1.size(0)``, or from ``a1.size(1)`` for batched input (E, max_num_tokens, K).

    Args:
        a1: hidden states, (M, K), or (E, max_num_tokens, K).
        w1: (E, N, K or packed).
        w2: (E, K, I or packed).
        topk_ids: (M, topk).

    Raises:
        ValueError: if a rank is wrong, the experts of w1 and w2 differ, or the tokens of a1 and topk_ids differ.
    """
    require(
        w1.dim() == 3 and w2.dim() == 3,
        lambda: f"w1 must be (E, N, K) and w2 (E, K, I), got {shape(w1)} and {shape(w2)}",
    )
    num_experts, n = w1.size(0), w1.size(1)
    k = w2.size(1)
    require(
        w2.size(0) == num_experts,
        lambda: f"w1 and w2 must hold the same number of experts, got w1 {shape(w1)} and w2 {shape(w2)}",
    )
    require(topk_ids.dim() == 2, lambda: f"topk_ids must be (M, topk), got {shape(topk_ids)}")
    if a1.dim() == 2:
        m = a1.size(0)
        require(
            topk_ids.size(0) == m,
            lambda: f"topk_ids must have one row a token: {m} rows, got {shape(topk_ids)}",
        )
    else:
        require(
            a1.dim() == 3,
            lambda: f"hidden states must be (M, K), or (E, max_num_tokens, K), got {shape(a1)}",
        )
        require(
            a1.size(0) == num_experts,
            lambda: f"batched hidden states must be (E={num_experts}, max_num_tokens, K), got {shape(a1)}",
        )
        m = a1.size(1)
    return num_experts, m, n, k, topk_ids.size(1)


def require_tensors(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def require_optional_tensors(**values: object) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")


def require_int(name: str, value: object) -> None:
    require_type(
        isinstance(value, int | torch.SymInt), lambda: f"{name} must be an int, got {type(value).__name__}"
    )


def check_float_dtype(name: str, t: Tensor) -> None:
    accepted = CUDA_DTYPES if t.device.type == "cuda" else CPU_DTYPES
    require_type(
        t.dtype in accepted,
        lambda: (
            f"{name} must be one of {', '.join(str(d) for d in accepted)} on {t.device.type}, got {t.dtype}"
        ),
    )


def check_same(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """Check that tensors have the dtype and device of ``reference``."""
    for name, t in others.items():
        if t is None:
            continue
        require_type(
            t.dtype is reference.dtype,
            lambda: (
                f"{name} must have the dtype of {reference_name}, {reference.dtype}, got {t.dtype}; "  # noqa: B023
                "convert one of them, or run under torch.autocast"
            ),
        )
        check_device(reference_name, reference, **{name: t})


def refuse_stored(**weights: Tensor) -> None:
    """Raise TypeError for weights in a dtype that only quantized layers have; autocast must not convert them either."""
    for name, w in weights.items():
        require_type(
            w.dtype.is_floating_point and w.dtype.itemsize > 1,
            lambda: (
                f"{name} must be floating point of 16 bits or more, got {w.dtype}, as weights are stored that are "  # noqa: B023
                "quantized: pass quant_config=compile_moe.FusedMoEQuantConfig(scheme, w1_scale=..., w2_scale=...), or "
                "convert them with compile_moe.dequantize_weights"
            ),
        )


def check_device(reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name}, {reference.device}, got {t.device}"
            )


def check_ids(topk_ids: Tensor) -> None:
    require(
        topk_ids.dim() == 2 and topk_ids.size(1) >= 1,
        lambda: f"topk_ids must be (M, topk) with topk at least 1, got {shape(topk_ids)}",
    )
    require_type(
        topk_ids.dtype in ID_DTYPES, lambda: f"topk_ids must be int32 or int64, got {topk_ids.dtype}"
    )


def check_expert_map(expert_map: Tensor | None, reference: Tensor) -> None:
    if expert_map is None:
        return
    require(
        expert_map.dim() == 1,
        lambda: f"expert_map must be (global_num_experts,), got {shape(expert_map)}",
    )
    require_type(
        expert_map.dtype in ID_DTYPES, lambda: f"expert_map must be int32 or int64, got {expert_map.dtype}"
    )
    check_device("topk_ids", reference, expert_map=expert_map)


def check_weight(name: str, layout: str, w: Tensor) -> None:
    """Check a stack of expert matrices: its rank, and what the kernels address with 32 bits inside one expert."""
    require(w.dim() == 3, lambda: f"{name} must be {layout}, got {shape(w)}")
    span = sum((size - 1) * stride for size, stride in zip(w.shape[1:], w.stride()[1:], strict=True))
    require(
        span < 2**31,
        lambda: f"one expert of {name} spans {span + 1} elements, more than 2^31; split the expert",
    )


def check_sorted(sorted_slots: Tensor, expert_offsets: Tensor, num_tokens: int, topk: int, w: Tensor) -> None:
    """Check the outputs of ``sort_tokens`` against the tokens and weights they are used with."""
    check_order(sorted_slots, expert_offsets, num_tokens, topk, w.size(0), "w", w)


def check_order(
    sorted_slots: Tensor,
    expert_offsets: Tensor,
    num_tokens: int,
    topk: int,
    num_experts: int,
    reference_name: str,
    reference: Tensor,
) -> None:
    """Check the outputs of ``sort_tokens``; the reference has their device."""
    require(topk >= 1, lambda: f"topk must be at least 1, got {topk}")
    require(
        sorted_slots.dim() == 1 and sorted_slots.size(0) == num_tokens * topk,
        lambda: f"sorted_slots must be (M * topk,) = ({num_tokens} * {topk},), got {shape(sorted_slots)}",
    )
    require(
        expert_offsets.dim() == 1 and expert_offsets.size(0) == num_experts + 1,
        lambda: f"expert_offsets must be (E + 1,) = ({num_experts + 1},), got {shape(expert_offsets)}",
    )
    require_type(
        sorted_slots.dtype is torch.int32 and expert_offsets.dtype is torch.int32,
        lambda: (
            f"sorted_slots and expert_offsets must be int32, got {sorted_slots.dtype} and {expert_offsets.dtype}"
        ),
    )
    check_device(reference_name, reference, sorted_slots=sorted_slots, expert_offsets=expert_offsets)
    check_in_one_piece(sorted_slots=sorted_slots, expert_offsets=expert_offsets)


def check_in_one_piece(**tensors: Tensor) -> None:
    """Check that tensors of one dimension have no gaps: kernels read them without a stride."""
    for name, t in tensors.items():
        if t.stride(0) != 1:
            raise ValueError(f"{name} must lie in one piece, got strides {t.stride()}; call .contiguous()")


def check_batch_size(num_experts: int, max_num_tokens: int) -> None:
    """Check the sizes of a batch (E, max_num_tokens, columns), whose rows have 32-bit numbers."""
    require(max_num_tokens >= 1, lambda: f"max_num_tokens must be at least 1, got {max_num_tokens}")
    require(
        num_experts * max_num_tokens < 2**31 - 1,
        lambda: (
            f"a batch must have fewer than 2^31 - 1 rows, got {num_experts} experts of {max_num_tokens}; lower "
            "max_num_tokens"
        ),
    )


def check_bias(name: str, bias: Tensor | None, layout: str, w: Tensor) -> None:
    """Check a bias against its weight (E, rows, columns)."""
    if bias is not None:
        require(
            bias.shape == w.shape[:2],
            lambda: f"{name} must be {layout} = {shape(w)[:2]}, got {shape(bias)}",
        )
