"""Wrong arguments of each op: the error names what was given and what is accepted, and the fake raises the same."""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from compile_moe.ops import batch_tokens, quantize_tokens
from tests.support.op_inputs import stage_inputs
from tests.support.oracle import make_layer

#: Name of the case, position of the argument, its new value, the error, what its message says.
Change = tuple[str, int, Callable[[Any], Any], type[Exception], str]

BF16 = torch.bfloat16

# M = 9, K = 48, I = 40, N = 80, E = 5 of 10, topk = 2
# fmt: off
CHANGES: dict[str, list[Change]] = {
    "sort_tokens": [
        ("ids-1d", 0, lambda t: t[0], ValueError, r"topk_ids must be \(M, topk\) .*got \(2,\)"),
        ("ids-float", 0, lambda t: t.float(), TypeError, r"topk_ids must be int32 or int64, got torch.float32"),
        ("topk-0", 0, lambda t: t[:, :0], ValueError, r"topk at least 1, got \(9, 0\)"),
        ("no-experts", 1, lambda n: 0, ValueError, r"num_experts must be at least 1, got 0"),
        ("many-experts", 1, lambda n: 4097, ValueError, r"num_experts must be at most 4096, .*, got 4097"),
        ("map-2d", 2, lambda m: m[None], ValueError, r"expert_map must be \(global_num_experts,\), got \(1, 10\)"),
        ("map-float", 2, lambda m: m.float(), TypeError, r"expert_map must be int32 or int64, got torch.float32"),
        ("map-elsewhere", 2, lambda m: m.to("meta"), ValueError, r"expert_map must be on .*cpu, got meta"),
    ],
    "gather_gemm": [
        ("x-1d", 0, lambda t: t[0], ValueError, r"hidden_states must be \(M, K\) .*\(5, 80, 48\), got \(48,\)"),
        ("x-narrow", 0, lambda t: t[:, :3], ValueError, r"hidden_states must .*\(5, 80, 48\), got \(9, 3\)"),
        ("x-fewer", 0, lambda t: t[:4], ValueError, r"sorted_slots must be .*4 \* 2,\), got \(18,\)"),
        ("x-int", 0, lambda t: t.int(), TypeError, r"hidden_states must be one of .*bfloat16.*, got torch.int32"),
        ("mixed", 0, lambda t: t.to(BF16), TypeError, r"dtype of hidden_states, torch.bfloat16, got torch.float32"),
        ("w-2d", 1, lambda t: t[0], ValueError, r"w1 must be \(E, N, K\).*got \(80, 48\)"),
        ("w-elsewhere", 1, lambda t: t.to("meta"), ValueError, r"w1 must be on .*, cpu, got meta"),
        ("odd-N", 1, lambda t: t[:, :79], ValueError, r"w1 .*even number of columns .*got 79"),
        ("slots-fewer", 2, lambda t: t[:3], ValueError, r"sorted_slots must be .*9 \* 2,\), got \(3,\)"),
        ("slots-2d", 2, lambda t: t[None], ValueError, r"sorted_slots must be .*got \(1, 18\)"),
        ("slots-int64", 2, lambda t: t.long(), TypeError, r"must be int32, got torch.int64 and torch.int32"),
        ("offsets-fewer", 3, lambda t: t[:3], ValueError, r"expert_offsets must be \(E \+ 1,\) = \(6,\), got \(3,\)"),
        ("offsets-int64", 3, lambda t: t.long(), TypeError, r"must be int32, got torch.int32 and torch.int64"),
        ("offsets-elsewhere", 3, lambda t: t.to("meta"), ValueError, r"expert_offsets must be on .*got meta"),
        ("topk-0", 4, lambda t: 0, ValueError, r"topk must be at least 1, got 0"),
        ("topk-3", 4, lambda t: 3, ValueError, r"sorted_slots must be .*9 \* 3,\), got \(18,\)"),
        ("bias-narrow", 5, lambda t: t[:, :4], ValueError, r"w1_bias must be .*\(5, 80\), got \(5, 4\)"),
        ("bias-mixed", 5, lambda t: t.to(BF16), TypeError, r"w1_bias must .*torch.float32, got torch.bfloat16"),
        ("epilogue-name", 6, lambda t: "silu", ValueError, r"epilogue must begin with .*got 'silu'"),
        ("epilogue-op", 6, lambda t: "ungated; t0 = f(gate); return t0", ValueError, r"one of add, .*got 'f'"),
    ],
    "act_and_mul": [
        ("int", 0, lambda t: t.int(), TypeError, r"gate_up must be one of .*bfloat16.*, got torch.int32"),
        ("odd-N", 0, lambda t: t[:, :79], ValueError, r"gate_up must have an even number .*got 79"),
        ("scalar", 0, lambda t: t[0, 0], ValueError, r"gate_up must be \(..., N\), got \(\)"),
        ("epilogue-end", 1, lambda t: "ungated; return t4", ValueError, r"must end with 'return .*got 'return t4'"),
        ("epilogue-up", 1, lambda t: "ungated; return up", ValueError, r"must end with 'return .*got 'return up'"),
        ("epilogue-arity", 1, lambda t: "ungated; t0 = mul(gate); return t0", ValueError, r"2 operands, got 't0"),
        ("epilogue-operand", 1, lambda t: "ungated; t0 = neg(x); return t0", ValueError, r"or a number, got 'x'"),
        ("epilogue-step", 1, lambda t: "ungated; neg(gate); return gate", ValueError, r"must read .*got 'neg\("),
    ],
    "scatter_gemm": [
        ("rows-1d", 0, lambda t: t[0], ValueError, r"intermediate must be \(S, I\) .*\(5, 48, 40\), got \(40,\)"),
        ("rows-narrow", 0, lambda t: t[:, :3], ValueError, r"intermediate must .*\(5, 48, 40\), got \(18, 3\)"),
        ("rows-fewer", 0, lambda t: t[:4], ValueError, r"intermediate must have a row a slot, 18, got \(4, 40\)"),
        ("rows-int", 0, lambda t: t.int(), TypeError, r"intermediate must be one of .*, got torch.int32"),
        ("mixed", 0, lambda t: t.to(BF16), TypeError, r"w2 must have the dtype .*bfloat16, got torch.float32"),
        ("w-2d", 1, lambda t: t[0], ValueError, r"w2 must be \(E, K, I\).*got \(48, 40\)"),
        ("w-elsewhere", 1, lambda t: t.to("meta"), ValueError, r"w2 must be on .*, cpu, got meta"),
        ("slots-fewer", 2, lambda t: t[:3], ValueError, r"sorted_slots must be .*9 \* 2,\), got \(3,\)"),
        ("offsets-fewer", 3, lambda t: t[:3], ValueError, r"expert_offsets must be .*\(6,\), got \(3,\)"),
        ("other-M", 4, lambda t: 4, ValueError, r"sorted_slots must be .*4 \* 2,\), got \(18,\)"),
        ("topk-0", 5, lambda t: 0, ValueError, r"topk must be at least 1, got 0"),
        ("bias-narrow", 6, lambda t: t[:, :4], ValueError, r"w2_bias must be .*\(5, 48\), got \(5, 4\)"),
        ("bias-mixed", 6, lambda t: t.to(BF16), TypeError, r"w2_bias must .*torch.float32, got torch.bfloat16"),
    ],
    "weight_and_reduce": [
        ("out-2d", 0, lambda t: t[0], ValueError, r"fused_out must be \(M, topk, K\), got \(2, 48\)"),
        ("out-int", 0, lambda t: t.int(), TypeError, r"fused_out must be one of .*, got torch.int32"),
        ("weights-fewer", 1, lambda t: t[:4], ValueError, r"topk_weights must be .*\(9, 2\), got \(4, 2\)"),
        ("weights-1d", 1, lambda t: t[:, 0], ValueError, r"topk_weights must be .*\(9, 2\), got \(9,\)"),
        ("weights-int", 1, lambda t: t.int(), TypeError, r"topk_weights must be floating point, got torch.int32"),
        ("weights-elsewhere", 1, lambda t: t.to("meta"), ValueError, r"topk_weights must be on .*cpu, got meta"),
        ("ids-fewer", 2, lambda t: t[:4], ValueError, r"topk_ids must be .*\(9, 2\), got \(4, 2\)"),
        ("ids-float", 2, lambda t: t.float(), TypeError, r"topk_ids must be int32 or int64, got torch.float32"),
        ("ids-elsewhere", 2, lambda t: t.to("meta"), ValueError, r"topk_ids must be on .*cpu, got meta"),
        ("map-alone", 2, lambda t: None, ValueError, r"expert_map without topk_ids"),
        ("map-2d", 3, lambda t: t[None], ValueError, r"expert_map must be .*got \(1, 10\)"),
        ("no-experts", 4, lambda t: -1, ValueError, r"num_experts must be given with topk_ids, got -1"),
    ],
    # counts (5,), 3 rows of each
    "sort_batch": [
        ("counts-2d", 0, lambda t: t[None], ValueError, r"expert_num_tokens must be \(E,\) .*got \(1, 5\)"),
        ("no-experts", 0, lambda t: t[:0], ValueError, r"with at least one expert, got \(0,\)"),
        ("counts-float", 0, lambda t: t.float(), TypeError, r"must be int32 or int64, got torch.float32"),
        ("no-rows", 1, lambda n: 0, ValueError, r"max_num_tokens must be at least 1, got 0"),
        ("too-many-rows", 1, lambda n: 2**30, ValueError, r"got 5 experts of 1073741824; lower max_num_tokens"),
    ],
    # tokens (10, 48), topk = 2, 9 rows of each of 2 experts
    "batch_tokens": [
        ("tokens-1d", 0, lambda t: t[0], ValueError, r"tokens must be \(M, C\), got \(48,\)"),
        ("tokens-int64", 0, lambda t: t.long(), TypeError, r"one of .*float8_e4m3fn.*int8, got torch.int64"),
        ("tokens-fewer", 0, lambda t: t[:4], ValueError, r"sorted_slots must be .*4 \* 2,\), got \(20,\)"),
        ("slots-int64", 1, lambda t: t.long(), TypeError, r"must be int32, got torch.int64 and torch.int32"),
        ("slots-elsewhere", 1, lambda t: t.to("meta"), ValueError, r"device of tokens, cpu, got meta"),
        ("offsets-2d", 2, lambda t: t[None], ValueError, r"expert_offsets must be .*\(3,\), got \(1, 3\)"),
        ("no-experts", 2, lambda t: t[:1], ValueError, r"with at least one expert, got \(1,\)"),
        ("topk-0", 3, lambda n: 0, ValueError, r"topk must be at least 1, got 0"),
        ("no-rows", 4, lambda n: 0, ValueError, r"max_num_tokens must be at least 1, got 0"),
    ],
    # batch (5, 3, 48)
    "reduce_batch": [
        ("batch-2d", 0, lambda t: t[0], ValueError, r"must be \(E, max_num_tokens, K\) .*got \(3, 48\)"),
        ("no-experts", 0, lambda t: t[:0], ValueError, r"with at least one expert, got \(0, 3, 48\)"),
        ("no-rows", 0, lambda t: t[:, :0], ValueError, r"max_num_tokens must be at least 1, got 0"),
        ("batch-int", 0, lambda t: t.int(), TypeError, r"batch must be one of .*, got torch.int32"),
        ("weights-fewer", 1, lambda t: t[:4], ValueError, r"topk_weights must be .*\(9, 2\), got \(4, 2\)"),
        ("weights-int", 1, lambda t: t.int(), TypeError, r"topk_weights must be floating point, got torch.int32"),
        ("rows-1d", 2, lambda t: t[0], ValueError, r"batch_rows must be \(M, topk\) .*got \(2,\)"),
        ("rows-int64", 2, lambda t: t.long(), TypeError, r"batch_rows must be int32, got torch.int64"),
        ("rows-elsewhere", 2, lambda t: t.to("meta"), ValueError, r"batch_rows must be on .*cpu, got meta"),
    ],
    "grouped_linear": [
        ("rows-1d", 0, lambda t: t[0], ValueError, r"rows must be \(S, K\) .*got \(40,\)"),
        ("rows-int", 0, lambda t: t.int(), TypeError, r"rows must be one of .*, got torch.int32"),
        ("w-2d", 1, lambda t: t[0], ValueError, r"w \(E, N, K\), got .*\(48, 40\)"),
        ("mixed", 1, lambda t: t.to(BF16), TypeError, r"w must have the dtype of rows.*got torch.bfloat16"),
        ("offsets-fewer", 2, lambda t: t[:3], ValueError, r"expert_offsets must be .*\(6,\), got \(3,\)"),
        ("offsets-float", 2, lambda t: t.float(), TypeError, r"expert_offsets must be int32, got torch.float32"),
        ("offsets-elsewhere", 2, lambda t: t.to("meta"), ValueError, r"expert_offsets must be on .*got meta"),
        ("bias-narrow", 3, lambda t: t[:, :4], ValueError, r"bias must be .*\(5, 48\), got \(5, 4\)"),
        ("bias-broadcast", 3, lambda t: t[:, :1], ValueError, r"bias must be .*\(5, 48\), got \(5, 1\)"),
        ("bias-mixed", 3, lambda t: t.to(BF16), TypeError, r"bias must .*torch.float32, got torch.bfloat16"),
    ],
    "fused_moe": [
        ("x-3d", 0, lambda t: t[None], ValueError, r"hidden_states must be \(M, K\), got \(1, 9, 48\)"),
        ("w1-2d", 1, lambda t: t[0], ValueError, r"w1 must be \(E, N, K\).*got \(80, 48\)"),
        ("mixed", 2, lambda t: t.to(BF16), TypeError, r"w2 must have the dtype of .*float32, got torch.bfloat16"),
        ("weights-int", 3, lambda t: t.int(), TypeError, r"topk_weights must be floating point, got torch.int32"),
        ("ids-fewer", 4, lambda t: t[:4], ValueError, r"topk_ids must .*9 rows, got \(4, 2\)"),
        ("activation", 5, lambda t: "swish", ValueError, r"activation must be one of silu, .*got 'swish'"),
        ("global", 6, lambda t: 7, ValueError, r"global_num_experts must be .*10, got 7"),
        ("map-float", 7, lambda t: t.float(), TypeError, r"expert_map must be int32 or int64, got torch.float32"),
        ("on-input", 8, lambda t: True, ValueError, r"needs topk = 1, got topk = 2"),
        ("bias", 9, lambda t: t[:, :4], ValueError, r"w1_bias must be .*\(5, 80\), got \(5, 4\)"),
    ],
}
# fmt: on
def cases() -> list[Any]:
    return [
        pytest.param(
            stage,
            change,
            id=f"{stage}-{change[0]}",
        )
        for stage, changes in CHANGES.items()
        for change in changes
    ]


@pytest.fixture(autouse=True)
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback of everything that raises inside a fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


def changed(stage: str, change: Change) -> list[Any]:
    arguments = list(stage_inputs(make_layer(M=9, K=48, I=40, E=5, topk=2, biased=True, mapped=True))[stage])
    _, position, new, _, _ = change
    arguments[position] = new(arguments[position])
    return arguments


@pytest.mark.parametrize(("stage", "change"), cases())
def test_wrong_argument(stage: str, change: Change) -> None:
    op = getattr(torch.ops.compile_moe, stage).default
    arguments = changed(stage, change)
    with pytest.raises(change[3], match=change[4]) as real:
        op(*arguments)
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        pytest.raises(Exception) as fake,
    ):
        op(*tree_map_only(Tensor, mode.from_tensor, arguments))
    assert (fake.type, str(fake.value)) == (real.type, str(real.value))


@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        pytest.param(0, lambda t: t + 99, r"below the number of experts, 10 .*got 1\d\d", id="ids"),
        pytest.param(2, lambda m: m + 9, r"local ids below 5, or to -1, got 13", id="map"),
    ],
)
def test_wrong_value(position: int, new: Callable[[Tensor], Tensor], message: str) -> None:
    arguments = changed("sort_tokens", ("", position, new, ValueError, ""))
    with pytest.raises(ValueError, match=message):
        torch.ops.compile_moe.sort_tokens(*arguments)


def test_messages() -> None:
    """How they read: one of each op."""
    shown = {
        "sort_tokens": "topk-0",
        "gather_gemm": "mixed",
        "act_and_mul": "odd-N",
        "scatter_gemm": "bias-narrow",
        "weight_and_reduce": "weights-1d",
        "fused_moe": "global",
    }
    messages = []
    for stage, name in shown.items():
        change = next(c for c in CHANGES[stage] if c[0] == name)
        with pytest.raises(change[3]) as caught:
            getattr(torch.ops.compile_moe, stage)(*changed(stage, change))
        messages.append(str(caught.value))
    shown_text = "\n".join(textwrap.fill(m, 100) for m in messages)
    assert_expected_inline(
        shown_text,
        """\
topk_ids must be (M, topk) with topk at least 1, got (9, 0)
w1 must have the dtype of hidden_states, torch.bfloat16, got torch.float32; convert one of them, or
run under torch.autocast
gate_up must have an even number of columns (gate and up), got 79
w2_bias must be (E, K) = (5, 48), got (5, 4)
topk_weights must be (M, topk) = (9, 2), got (9,)
global_num_experts must be the length of expert_map, 10, got 7""",
    )


def orders_with_gaps() -> Iterator[tuple[str, list[Tensor]]]:
    order = {"sorted_slots": torch.arange(6).int(), "expert_offsets": torch.tensor([0, 2, 6]).int()}
    for name, t in order.items():
        for bad in (torch.stack([t, t], 1)[:, 0], t[:1].expand(len(t))):
            yield name, list((order | {name: bad}).values())


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_orders_with_gaps(fake: bool) -> None:
    """Kernels read sorted_slots and expert_offsets without strides."""
    for name, order in orders_with_gaps():
        with FakeTensorMode() if fake else contextlib.nullcontext() as mode:
            given = [mode.from_tensor(t) for t in order] if mode is not None else order
            tokens = torch.zeros(3, 4)
            with pytest.raises(ValueError, match=rf"{name} must lie in one piece, got strides .*contiguous"):
                batch_tokens(tokens, *given, 2, 4)
            if name == "expert_offsets":
                with pytest.raises(ValueError, match="expert_offsets must lie in one piece"):
                    quantize_tokens(tokens, "int8 per token", None, None, given[1])
