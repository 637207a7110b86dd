"""torch.library ops of the fused MoE layer: schema, checks, shapes, fakes and implementations.

Letters used throughout: M tokens, K hidden size, I intermediate size, N = w1.size(1) (2I where gated, I where
not), E local experts, topk experts per token, S = M * topk slots (slot = token * topk + j).
"""

if __name__ != "compile_moe.ops":
    raise ImportError(
        f"compile_moe's ops were imported as {__name__!r}: a second registration would replace the first and "
        "unhook its lowerings. Import them as 'compile_moe.ops'"
    )

from compile_moe.ops.act_and_mul import act_and_mul
from compile_moe.ops.batch_tokens import batch_tokens
from compile_moe.ops.fused_moe import fused_moe, fused_moe_
from compile_moe.ops.gather_gemm import gather_gemm
from compile_moe.ops.one_token_experts import one_token_experts
from compile_moe.ops.problem_size import _moe_problem_size
from compile_moe.ops.quantize_tokens import quantize_tokens
from compile_moe.ops.quantized_gather_gemm import quantized_gather_gemm
from compile_moe.ops.quantized_one_token_experts import quantized_one_token_experts
from compile_moe.ops.quantized_scatter_gemm import quantized_scatter_gemm
from compile_moe.ops.reduce_batch import reduce_batch
from compile_moe.ops.route_and_sort_tokens import route_and_sort_tokens
from compile_moe.ops.route_tokens import route_tokens
from compile_moe.ops.scatter_gemm import scatter_gemm
from compile_moe.ops.sort_batch import sort_batch
from compile_moe.ops.sort_tokens import sort_tokens
from compile_moe.ops.weight_and_reduce import weight_and_reduce

__all__ = [
    "_moe_problem_size",
    "act_and_mul",
    "batch_tokens",
    "fused_moe",
    "fused_moe_",
    "gather_gemm",
    "one_token_experts",
    "quantize_tokens",
    "quantized_gather_gemm",
    "quantized_one_token_experts",
    "quantized_scatter_gemm",
    "reduce_batch",
    "route_and_sort_tokens",
    "route_tokens",
    "scatter_gemm",
    "sort_batch",
    "sort_tokens",
    "weight_and_reduce",
]
