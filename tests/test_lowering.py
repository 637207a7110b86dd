"""Lowerings: what inductor fuses with the ops, counted in generated code, and their numerics on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe.lowering.act_and_mul import inductor_function
from compile_moe.ops import act_and_mul, route_tokens, weight_and_reduce
from compile_moe.ops.epilogue import VOCABULARY, parse
from compile_moe.ops.named_activations import NAMES, program_text
from compile_moe.ops.sort_tokens import local_experts
from tests.support.fake_cuda import cuda_empty, generated_kernels
from tests.support.op_inputs import stage_inputs
from tests.support.oracle import CASES, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

K = 2048


def finalize_block(
    fused_out: Tensor, weights: Tensor, ids: Tensor, shared: Tensor, residual: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor]:
    h = weight_and_reduce(fused_out, weights, ids, None, 64) + shared + residual
    return h, F.rms_norm(h, norm_weight.shape, norm_weight, 1e-6)


def finalize_arguments(topk: int, m: int = 32, k: int = K) -> list[Tensor]:
    return [
        cuda_empty(m, topk, k),
        cuda_empty(m, topk, dtype=torch.float32),
        cuda_empty(m, topk, dtype=torch.int64),
        cuda_empty(m, k),
        cuda_empty(m, k),
        cuda_empty(k),
    ]


def kernels_of_finalize(function: Callable[..., Any], topk: int, dynamic: bool, **sizes: int) -> list[str]:
    dims = [(i, 0) for i in range(5)] if dynamic else []
    generated = generated_kernels(function, lambda: finalize_arguments(topk, **sizes), dims)
    assert generated.extern_calls == generated.op_calls == []
    return generated.triton_kernels


# The sum over a token's experts is written out: one summand, two, and many.
@pytest.mark.parametrize(("topk", "dynamic"), [(1, False), (2, True), (8, False), (8, True), (16, True)])
def test_finalize_residual_and_norm_are_one_kernel(topk: int, dynamic: bool) -> None:
    kernels = kernels_of_finalize(finalize_block, topk, dynamic)
    assert len(kernels) == 1, kernels


def finalized(fused_out: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    return weight_and_reduce(fused_out, weights, ids, None, 64)


#: Of fused_out, weights, ids: with which finalize is the op's own kernel.
ALONE: dict[str, Callable[..., Any]] = {
    "returned": finalized,
    "as a view": lambda f, w, i: finalized(f, w, i).view(-1, 4, K),
    "twice": lambda f, w, i: [finalized(f, w, i)] * 2,
    "of views": lambda f, w, i: finalized(f.view(-1, 8, K), w.view(-1, 8), i.view(-1, 8)),
    "read by an op of ours": lambda f, w, i: route_tokens(finalized(f, w, i)[:, :64], 2, "softmax"),
}
#: What is left to inductor, since something is in reach, and the kernels.
WITH_NEIGHBOURS: dict[str, tuple[Callable[..., Any], int]] = {
    "behind": (lambda f, w, i: finalized(f, w, i) + 1, 1),
    "behind a view": (lambda f, w, i: finalized(f, w, i)[:, None] + 1, 1),
    "weights": (lambda f, w, i: finalized(f, w.sigmoid(), i), 1),
    "rows": (lambda f, w, i: finalized(f * 2, w, i), 1),
    "rows of another lowering": (
        lambda f, w, i: finalized(act_and_mul(f.repeat(1, 1, 2), program_text("silu")), w, i),
        1,
    ),
    "also returned": (lambda f, w, i: ((y := finalized(f, w, i)), y + 1), 1),
    "also read by an op of ours": (
        lambda f, w, i: (route_tokens((y := finalized(f, w, i))[:, :64], 2, "softmax"), y + 1),
        1,
    ),
}


def generated_for(function: Callable[..., Any]) -> Any:
    return generated_kernels(function, lambda: finalize_arguments(8)[:3], [(i, 0) for i in range(3)])


@pytest.mark.parametrize("case", ALONE)
def test_finalize_alone_is_the_ops_own_kernel(case: str) -> None:
    """Which is faster than inductor's where nothing is fused."""
    generated = generated_for(ALONE[case])
    ours = ["weight_and_reduce"]
    assert [name.removesuffix(".out") for name in generated.op_calls][:1] == ours
    assert generated.triton_kernels == []


@pytest.mark.parametrize("neighbours", WITH_NEIGHBOURS)
def test_finalize_is_fused_with(neighbours: str) -> None:
    function, kernels = WITH_NEIGHBOURS[neighbours]
    generated = generated_for(function)
    assert len(generated.triton_kernels) == kernels
    assert "weight_and_reduce" not in "".join(generated.op_calls)


#: Kernels for few tokens, by K. So long a row inductor reduces in parts, and a kernel behind them takes it together.
ONE_TOKEN = {2048: 1, 2880: 1, 7168: 1, 16384: 3}


@pytest.mark.parametrize("k", ONE_TOKEN)
def test_finalize_residual_and_norm_of_one_token(k: int) -> None:
    kernels = kernels_of_finalize(finalize_block, 8, dynamic=False, m=1, k=k)
    assert len(kernels) == ONE_TOKEN[k], kernels


#: Kernels of finalize, residual add, RMSNorm and a quantization. Groups' maxima are reductions of another shape than
#: the norm's, which inductor puts into a kernel of their own.
QUANTIZED = {"tensor": 1, "token": 1, "group": 2}


def quantize(x: Tensor, per: str) -> tuple[Tensor, ...]:
    """To fp8: by a given scale, by each token's largest value, by that of each 128 columns; and the scales."""
    if per == "tensor":
        return (((x.float() / 0.25).clamp(-448, 448)).to(torch.float8_e4m3fn),)
    rows = (x.unflatten(-1, (-1, 128)) if per == "group" else x).float()
    scales = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (rows / scales).to(torch.float8_e4m3fn).view(x.shape), scales.squeeze(-1)


@pytest.mark.parametrize("mapped", [False, True])
def test_slots_of_other_ranks_are_not_loaded(mapped: bool) -> None:
    """Their rows are masked by what the map says. Without a map few slots are skipped: rows are loaded at once."""

    def finalize(out: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor) -> Tensor:
        return weight_and_reduce(out, weights, ids, expert_map if mapped else None, 4, True) + 1

    def make() -> list[Tensor]:
        routing = cuda_empty(16, 2, dtype=torch.float32), cuda_empty(16, 2, dtype=torch.int64)
        return [cuda_empty(16, 2, 256), *routing, cuda_empty(8, dtype=torch.int32)]

    code = generated_kernels(finalize, make).code
    loads = [line for line in code.splitlines() if "tl.load(in_ptr" in line and ".to(tl.float32)" in line]
    assert len(loads) == 2, "a row of each slot"
    masks = [line.split("), ", 1)[1].split(", ")[0] for line in loads]
    assert all((("tmp" in mask) is mapped) for mask in masks), masks


@pytest.mark.parametrize(
    ("per", "topk", "dynamic"),
    [*((per, 8, True) for per in QUANTIZED), ("tensor", 16, False), ("token", 1, True), ("group", 16, True)],
)
def test_finalize_and_quantization(per: str, topk: int, dynamic: bool) -> None:
    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        h, y = finalize_block(*arguments)
        return h, *quantize(y, per)

    kernels = kernels_of_finalize(function, topk, dynamic)
    assert len(kernels) == QUANTIZED[per], kernels


class Quantizing(compile_moe.MoEPrepareAndFinalizeNoEP):
    """Prepares tokens as experts in fp8 want them."""

    def __init__(self, per: str) -> None:
        self.per = per

    def prepare(self, a1: Tensor, *args: Any) -> compile_moe.PrepareResult:
        return compile_moe.PrepareResult(*quantize(a1, self.per))


@pytest.mark.parametrize("per", QUANTIZED)
def test_norm_and_quantization_of_prepare(per: str) -> None:
    """The router reads what the norm gives, the experts what prepare makes of it."""

    def function(x: Tensor, norm_weight: Tensor, router: Tensor, *routing: Tensor) -> tuple[Any, Tensor]:
        h = F.rms_norm(x, (K,), norm_weight, 1e-6)
        prepared = Quantizing(per).prepare(h, None, None, *routing, 64, None, False)
        return prepared[:2], h @ router

    def make() -> list[Tensor]:
        routing = cuda_empty(32, 8, dtype=torch.float32), cuda_empty(32, 8, dtype=torch.int64)
        return [cuda_empty(32, K), cuda_empty(K), cuda_empty(K, 64), *routing]

    generated = generated_kernels(function, make, [(0, 0)])
    assert len(generated.triton_kernels) == QUANTIZED[per], generated.triton_kernels
    assert generated.extern_calls == ["extern_kernels.mm"]


@pytest.mark.parametrize("quantization", ["static", "per-token"])
@pytest.mark.parametrize("name", NAMES)
def test_activation_fuses_with_its_neighbours(name: str, quantization: str) -> None:
    text = program_text(name)

    def function(gate_up: Tensor) -> Tensor:
        y = act_and_mul(gate_up * 0.5, text)
        scale = y.abs().amax(-1, keepdim=True).float() / 448 if quantization == "per-token" else 0.25
        return (y / scale).to(torch.float8_e4m3fn)

    generated = generated_kernels(function, lambda: [cuda_empty(32, 1024, dtype=torch.bfloat16)])
    # Inductor splits reductions over strided reads, which interleaved columns are.
    is_split = name == "swigluoai" and quantization == "per-token"
    assert len(generated.triton_kernels) == (3 if is_split else 1), generated.triton_kernels
    assert generated.op_calls == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_finalize_numerics(case: str, dtype: torch.dtype) -> None:
    """Compiled and fused with a neighbour, against the op: NaN in skipped slots doesn't get through."""
    if dtype is not torch.float32 and case not in ("plain", "skipped-mapped"):
        pytest.skip("one dtype for all cases")
    layer = make_layer(**CASES[case], dtype=dtype)
    fused_out, weights, ids, expert_map, num_experts, _ = stage_inputs(layer)["weight_and_reduce"]
    valid = local_experts(ids, num_experts, expert_map) < num_experts
    poisoned = torch.where(valid[..., None], fused_out, torch.nan)

    def doubled(fused_out: Tensor, weights: Tensor) -> list[Tensor]:
        options = ids, expert_map, num_experts
        return [weight_and_reduce(fused_out, weights, *options, apply) * 2 for apply in (True, False)]

    torch.testing.assert_close(torch.compile(doubled)(poisoned, weights), doubled(fused_out, weights))


def test_inductor_has_the_whole_vocabulary() -> None:
    for name in VOCABULARY:
        inductor_function(name)


def text_with(op: str) -> str:
    """An activation with an operation of the vocabulary."""
    arity = VOCABULARY[op].arity
    is_bool = op in ("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not")
    operands = {1: "gate", 2: "gate, up", 3: "t0, gate, 0.25"}[arity]
    steps = ["t0 = gt(gate, up)", "t1 = lt(up, 0.5)"]
    if op.startswith("logical"):
        operands = {1: "t0", 2: "t0, t1"}[arity]
    steps.append(f"t2 = {op}({operands})")
    steps.append("t3 = where(t2, gate, up)" if is_bool else "t3 = mul(t2, 1.0)")
    return "; ".join(["concatenated", *steps, "return t3"])


def test_activation_numerics() -> None:
    """The whole vocabulary, compiled in one graph, against what evaluates it."""
    texts = {op: text_with(op) for op in VOCABULARY}
    gate_up = torch.rand(37, 2 * 19) * 3 + 0.01
    compiled = torch.compile(lambda x: {op: act_and_mul(x, text) * 2 for op, text in texts.items()})(gate_up)
    for op, result in compiled.items():
        expected = parse(texts[op]).evaluate(gate_up) * 2
        torch.testing.assert_close(result, expected, equal_nan=True, msg=lambda text, op=op: f"{op}: {text}")
