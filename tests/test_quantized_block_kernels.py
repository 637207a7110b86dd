"""The kernels around quantized experts, in code generated for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe
from compile_moe import (
    FusedMoEModularKernel,
    FusedMoEQuantConfig,
    MoEPrepareAndFinalizeNoEP,
    TritonExperts,
    routers,
)
from compile_moe.ops import quantize_tokens, route_tokens
from compile_moe.quantization import make_scheme
from tests.support.fake_cuda import cuda_empty, generated_kernels
from tests.test_block_kernels import TOPK, E, I, K, M, after_router, by_kernels, clamped_silu, in_order
from tests.test_lowering import finalize_arguments, finalize_block

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

#: Scalings; static ones with a scale for all, or for each token.
SCALINGS = {
    "fp8 per token": "float8_e4m3fn per token",
    "int8 per token": "int8 per token",
    "fp8 static": "float8_e4m3fn per tensor",
    "fp8 static each": "float8_e4m3fn per tensor",
    "fp8 per tensor": "float8_e4m3fn per tensor",
    "fp8 per group": "float8_e4m3fn per group of 128",
    # Columns in groups of different lengths, which the lowering leaves to the op.
    "fp8 per group of 96": "float8_e4m3fn per group of 96",
}


@pytest.mark.parametrize("case", ["fp8 per token", "int8 per token", "fp8 per group"])
def test_few_operations_an_element(case: str) -> None:
    """Maxima are of integers, as NaN among floats costs three operations more; one reciprocal divides all that share
    a scale; and nothing is clamped by operations that NaN passes, which are four each.
    """
    code = generated_kernels(
        lambda x: quantize_tokens(-x, SCALINGS[case]), lambda: (cuda_empty(M, 2048),)
    ).code
    assert code.count("and.b32 $0, $1, 0x7fffffff;") == 1 and "tl_math.abs(" not in code
    assert "rcp.rn.f32 $0, $1;" in code and "triton_helpers.minimum(" not in code
    assert "-448.0" not in code and "-127.0" not in code
    assert ("max.s32" in code) is case.startswith("int8")


def kernels_of(function: Callable[..., Any], make: Any, *dynamic: int) -> list[str]:
    generated = generated_kernels(
        function, make, [(i, 0) for i in dynamic], joint_graph_constant_folding=False
    )
    return in_order(generated)


def static_scale(case: str, m: int) -> list[Tensor]:
    if "static" not in case:
        return []
    return [cuda_empty(*((m, 1) if "each" in case else (1,)), dtype=torch.float32)]


def quantized(x: Tensor, case: str, scale: list[Tensor]) -> tuple[Tensor, ...]:
    """Without the copy of a scale that is given for all, as a layer uses it."""
    result, scales = quantize_tokens(x, SCALINGS[case], *scale)
    return (result,) if case == "fp8 static" else (result, scales)


#: Of stored tokens: kernels that inductor generates, and calls of the op.
BESIDE: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "nothing": (lambda x: quantize_tokens(x, "int8 per token"), 0, 1),
    "nothing, of a view": (lambda x: quantize_tokens(x.view(-1, K // 2), "int8 per token"), 0, 1),
    "another op of ours": (
        lambda x: (quantize_tokens(x, "int8 per token"), route_tokens(x[:, :64], 2, "softmax")),
        0,
        1,
    ),
    "a norm": (lambda x: (quantize_tokens(x, "int8 per token"), F.rms_norm(x, (K,))), 1, 0),
    "maxima of a view": (
        lambda x: (quantize_tokens(x, "int8 per token"), x.view(M, K).float().abs().amax(1)),
        1,
        0,
    ),
    "another quantization": (
        lambda x: (quantize_tokens(x, "int8 per token"), quantize_tokens(x, "float8_e4m3fn per token")),
        1,
        0,
    ),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_stored_tokens_are_read_once(beside: str) -> None:
    """By the op's own kernel, or by one of inductor's for all that reads them."""
    function, num_generated, num_called = BESIDE[beside]
    generated = generated_kernels(function, lambda: (cuda_empty(M, K),))
    called = [name for name in generated.op_calls if name.startswith("quantize_tokens")]
    assert (len(generated.triton_kernels), len(called)) == (num_generated, num_called)


class TestQuantization(expecttest.TestCase):
    def test_norm_and_quantization(self) -> None:
        """The router reads what the norm gives, too."""

        def kernels(case: str, m: int, dynamic: bool) -> list[str]:
            def function(x: Tensor, norm: Tensor, gate: Tensor, *scale: Tensor) -> tuple[Any, Tensor]:
                h = F.rms_norm(x, (K,), norm, 1e-6)
                return quantized(h, case, list(scale)), h @ gate

            def make() -> list[Tensor]:
                return [cuda_empty(m, K), cuda_empty(K), cuda_empty(K, 64), *static_scale(case, m)]

            varying = (0, 3) if "each" in case else (0,)
            return kernels_of(function, make, *(varying if dynamic else ()))

        found = {
            f"{case}{' one token' if m == 1 else '' if dynamic else ' fixed'}": kernels(case, m, dynamic)
            for case in SCALINGS
            for m, dynamic in ((M, True), (M, False), (1, False))
        }
        self.assertExpectedInline(
            by_kernels(found),
            """\
fp8 per token, fp8 per token fixed, fp8 per token one token, int8 per token, int8 per token fixed, int8 per
    token one token, fp8 static, fp8 static fixed, fp8 static one token, fp8 static each, fp8 static each
    fixed, fp8 static each one token, fp8 per tensor one token:
    rms_norm, mm
fp8 per tensor, fp8 per tensor fixed, fp8 per group of 96, fp8 per group of 96 fixed, fp8 per group of 96 one
    token:
    rms_norm, quantize_tokens, mm
fp8 per group, fp8 per group fixed, fp8 per group one token:
    rms_norm, triton, mm""",
        )

    def test_finalize_and_quantization(self) -> None:
        """With a shared expert's add, the residual and the RMSNorm between."""

        def kernels(case: str) -> list[str]:
            def function(*arguments: Tensor) -> tuple[Any, ...]:
                h, y = finalize_block(*arguments[:6])
                return h, y, quantized(y, case, list(arguments[6:]))

            def make() -> list[Tensor]:
                return [*finalize_arguments(8), *static_scale(case, 32)]

            return kernels_of(function, make, *range(5), *((6,) if "each" in case else ()))

        self.assertExpectedInline(
            by_kernels({case: kernels(case) for case in SCALINGS}),
            """\
fp8 per token, int8 per token, fp8 static, fp8 static each:
    weight_and_reduce + rms_norm
fp8 per tensor, fp8 per group of 96:
    weight_and_reduce + rms_norm, quantize_tokens
fp8 per group:
    weight_and_reduce + rms_norm, triton""",
        )

    def test_blocks(self) -> None:
        """RMSNorm, router, quantized experts, residual, RMSNorm; with any activation that an epilogue can hold."""
        cases = [(name, "silu", m) for name in LAYERS for m in (M, 1)]
        # An epilogue knows nothing of the scales behind it.
        cases += [(name, "callable", M) for name in ("int8 per token", "fp8 per tensor", "fp8 per group")]
        cases += [("fp8 per token", activation, M) for activation in ("gelu", "swigluoai")]
        found = {
            f"{name} {activation} {'one token' if m == 1 else ''}".strip(): block_kernels(name, activation, m)
            for name, activation, m in cases
        }
        assert all(len(after_router(names)) <= 8 for names in found.values())
        self.assertExpectedInline(
            by_kernels(found),
            """\
fp8 per token silu, int8 per token silu, int8 per token callable, fp8 per token gelu, fp8 per token swigluoai:
    rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, quantize_tokens, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 per token silu one token, int8 per token silu one token, fp8 per tensor silu one token:
    rms_norm, mm, route_tokens, quantized_one_token_experts, rms_norm
fp8 static silu, fp8 static silu one token:
    rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, triton, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 static of each expert silu, fp8 static of each expert silu one token:
    triton, rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, triton, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 per tensor silu, fp8 per tensor callable:
    rms_norm, mm, route_and_sort_tokens, quantize_tokens, quantized_gather_gemm, triton, quantize_tokens,
    quantized_scatter_gemm, weight_and_reduce + rms_norm
fp8 per group silu, fp8 per group callable:
    rms_norm, mm, route_and_sort_tokens, triton, quantized_gather_gemm, quantize_tokens,
    quantized_scatter_gemm, weight_and_reduce + rms_norm
fp8 per group silu one token:
    rms_norm, mm, route_tokens, triton, quantized_one_token_experts, rms_norm""",
        )

    def test_activations_between_the_gemms(self) -> None:
        """Activation and quantization are one kernel, but for functions of rows before scales of groups."""
        found = {
            f"{name} {activation}": block_kernels(name, activation)
            for activation in ("row-wise", "overridden")
            for name in LAYERS
        }
        self.assertExpectedInline(
            by_kernels(found),
            """\
fp8 per token row-wise, int8 per token row-wise, fp8 static row-wise:
    rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, triton, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 static of each expert row-wise:
    triton, rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, triton, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 per tensor row-wise:
    rms_norm, mm, route_and_sort_tokens, quantize_tokens, quantized_gather_gemm, triton, quantize_tokens,
    quantized_scatter_gemm, weight_and_reduce + rms_norm
fp8 per group row-wise:
    rms_norm, mm, route_and_sort_tokens, triton, quantized_gather_gemm, triton, triton,
    quantized_scatter_gemm, weight_and_reduce + rms_norm
fp8 per token overridden, int8 per token overridden, fp8 static overridden:
    rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, silu, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 static of each expert overridden:
    triton, rms_norm, mm, route_and_sort_tokens, quantized_gather_gemm, silu, quantized_scatter_gemm,
    weight_and_reduce + rms_norm
fp8 per tensor overridden:
    rms_norm, mm, route_and_sort_tokens, quantize_tokens, quantized_gather_gemm, silu, quantize_tokens,
    quantized_scatter_gemm, weight_and_reduce + rms_norm
fp8 per group overridden:
    rms_norm, mm, route_and_sort_tokens, triton, quantized_gather_gemm, silu, quantized_scatter_gemm,
    weight_and_reduce + rms_norm""",
        )


#: Schemes, and the static scales of their tokens.
LAYERS = {
    "fp8 per token": ("fp8_w8a8_channel", 0),
    "int8 per token": ("int8_w8a8_channel", 0),
    "fp8 static": ("fp8_w8a8_tensor", 1),
    "fp8 static of each expert": ("fp8_w8a8_tensor", E),
    "fp8 per tensor": ("fp8_w8a8_tensor", 0),
    "fp8 per group": ("fp8_w8a8_block", 0),
}


def row_wise(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate.softmax(-1) * up


class Overridden(TritonExperts):
    """Pointwise, but no argument of the layer."""

    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        output.copy_(clamped_silu(input))


ACTIVATIONS: dict[str, Any] = {"callable": clamped_silu, "row-wise": row_wise}


def block_kernels(name: str, activation: str, m: int = M) -> list[str]:
    """Of a block, whose config is made where the layer is called."""
    scheme_name, num_static = LAYERS[name]
    scheme = make_scheme(scheme_name)

    def block(x: Tensor, norm: Tensor, gate: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        w1, w2, w1_scale, w2_scale, *static = tensors
        a1_scale, a2_scale = static or (None, None)
        config = FusedMoEQuantConfig(
            scheme_name, w1_scale=w1_scale, w2_scale=w2_scale, a1_scale=a1_scale, a2_scale=a2_scale
        )
        h = F.rms_norm(x, (K,), norm, 1e-6)
        weights, ids = routers.softmax_topk(F.linear(h, gate), TOPK, renormalize=True)
        function = ACTIVATIONS.get(activation, activation)
        experts = compile_moe.fused_experts
        options: dict[str, Any] = {"activation": function, "quant_config": config}
        if activation == "overridden":
            parts = MoEPrepareAndFinalizeNoEP(config), Overridden(quant_config=config)
            experts, options = FusedMoEModularKernel(*parts), {}
        x = x + experts(h, w1, w2, weights, ids, **options)
        return x, F.rms_norm(x, (K,), norm, 1e-6)

    def make() -> list[Tensor]:
        shapes = (E, 2 * I, K), (E, K, I)
        weights = [cuda_empty(*scheme.weight_shape(*s), dtype=scheme.weight_dtype) for s in shapes]
        scales = [cuda_empty(*scheme.scale_shape(*s), dtype=torch.float32) for s in shapes]
        static = [cuda_empty(num_static, dtype=torch.float32) for _ in range(2 if num_static else 0)]
        return [cuda_empty(m, K), cuda_empty(K), cuda_empty(E, K), *weights, *scales, *static]

    return kernels_of(block, make, *((0,) if m > 1 else ()))
