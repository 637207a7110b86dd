"""Lowerings: what inductor fuses with the ops, counted in generated code, and their numerics on CPU."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe.lowering.act_and_mul import inductor_function
from compile_moe.ops import act_and_mul, weight_and_reduce
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
    return h, F.rms_norm(h, (K,), norm_weight, 1e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("topk", [1, 2, 4, 6, 8, 10, 16])
def test_finalize_residual_and_norm_are_one_kernel(topk: int, dynamic: bool) -> None:
    def arguments() -> list[Tensor]:
        return [
            cuda_empty(32, topk, K, dtype=torch.bfloat16),
            cuda_empty(32, topk),
            cuda_empty(32, topk, dtype=torch.int64),
            cuda_empty(32, K, dtype=torch.bfloat16),
            cuda_empty(32, K, dtype=torch.bfloat16),
            cuda_empty(K, dtype=torch.bfloat16),
        ]

    dims = [(i, 0) for i in range(5)] if dynamic else []
    generated = generated_kernels(finalize_block, arguments, dims)
    assert len(generated.triton_kernels) == 1, generated.triton_kernels
    assert generated.extern_calls == generated.op_calls == []


@pytest.mark.parametrize("quantization", ["static", "per-token"])
@pytest.mark.parametrize("name", NAMES)
def test_activation_fuses_with_its_neighbours(name: str, quantization: str) -> None:
    if name == "swigluoai" and quantization == "per-token":
        pytest.skip("inductor splits reductions over strided reads, which interleaved columns are")
    text = program_text(name)

    def function(gate_up: Tensor) -> Tensor:
        y = act_and_mul(gate_up * 0.5, text)
        scale = y.abs().amax(-1, keepdim=True).float() / 448 if quantization == "per-token" else 0.25
        return (y / scale).to(torch.float8_e4m3fn)

    generated = generated_kernels(function, lambda: [cuda_empty(32, 1024, dtype=torch.bfloat16)])
    assert len(generated.triton_kernels) == 1, generated.triton_kernels
    assert generated.op_calls == []


def moe_block(x: Tensor, norm: Tensor, router: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = F.rms_norm(x, (x.size(-1),), norm, 1e-6)
    weights, ids = (h @ router.t()).softmax(-1, dtype=torch.float32).topk(8)
    weights = weights / weights.sum(-1, keepdim=True)
    y = compile_moe.fused_experts(h, w1, w2, weights, ids, activation=moe_block_activation)
    return F.rms_norm(x + y, (x.size(-1),), norm, 1e-6)


def moe_block_activation(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.clamp(max=7)) * up


def block_arguments() -> list[Tensor]:
    bf16 = torch.bfloat16
    return [
        cuda_empty(16, K, dtype=bf16),
        cuda_empty(K, dtype=bf16),
        cuda_empty(128, K, dtype=bf16),
        cuda_empty(128, 2 * 768, K, dtype=bf16),
        cuda_empty(128, K, 768, dtype=bf16),
    ]


class TestBlock(expecttest.TestCase):
    def test_kernels_of_a_block(self) -> None:
        """Nothing of the layer adds a copy, a clone, a fill or a cast: what isn't listed here isn't there."""
        with torch.no_grad():
            generated = generated_kernels(moe_block, block_arguments, [(0, 0)])
        self.assertExpectedInline(
            "\n".join(describe(generated)),
            """\
triton
triton weight_and_reduce
extern_kernels.mm
torch.ops.compile_moe.route_and_sort_tokens.default
torch.ops.compile_moe.gather_gemm.default
torch.ops.compile_moe.scatter_gemm.default""",
        )


def describe(generated: Any) -> list[str]:
    """Generated kernels, named by what of the library is in them (the rest of a name varies with torch); calls."""
    ours = ("act_and_mul", "weight_and_reduce")
    return [
        *(
            " ".join(["triton", *(name for name in ours if name in kernel)])
            for kernel in generated.triton_kernels
        ),
        *generated.extern_calls,
    ]


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
    for apply_weights in (True, False):
        eager = weight_and_reduce(fused_out, weights, ids, expert_map, num_experts, apply_weights)
        compiled = torch.compile(
            lambda f, w, apply=apply_weights: weight_and_reduce(f, w, ids, expert_map, num_experts, apply) * 2
        )(poisoned, weights)
        torch.testing.assert_close(compiled, eager * 2)


def test_inductor_has_the_whole_vocabulary() -> None:
    for name in VOCABULARY:
        inductor_function(name)


@pytest.mark.parametrize("op", VOCABULARY)
def test_activation_numerics(op: str) -> None:
    """Each operation of the vocabulary: compiled against evaluated."""
    arity = VOCABULARY[op].arity
    is_bool = op in ("lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not")
    operands = {1: "gate", 2: "gate, up", 3: "t0, gate, 0.25"}[arity]
    steps = ["t0 = gt(gate, up)", "t1 = lt(up, 0.5)"]
    if op.startswith("logical"):
        operands = {1: "t0", 2: "t0, t1"}[arity]
    steps.append(f"t2 = {op}({operands})")
    steps.append("t3 = where(t2, gate, up)" if is_bool else "t3 = mul(t2, 1.0)")
    text = "; ".join(["concatenated", *steps, "return t3"])
    gate_up = torch.rand(37, 2 * 19) * 3 + 0.01
    compiled = torch.compile(lambda x: act_and_mul(x, text) * 2)(gate_up)
    torch.testing.assert_close(compiled, parse(text).evaluate(gate_up) * 2)
