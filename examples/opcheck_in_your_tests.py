"""torch.library.opcheck on the library's ops with your own shapes: run as a script or with pytest.

opcheck compares schema, fake and real results and tracing under AOTAutograd. Use it for the shapes, strides and
dtypes that your model has; the library's own tests do so for theirs.
"""

from typing import Any

import torch

import compile_moe  # registers torch.ops.compile_moe


def my_inputs() -> dict[str, tuple[Any, ...]]:
    """Arguments of each op as a model with transposed weights would give them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_tokens, hidden, intermediate, num_experts, topk = 6, 32, 48, 4, 2
    x = torch.randn(num_tokens, hidden, device=device)
    w1 = torch.randn(num_experts, hidden, 2 * intermediate, device=device).transpose(1, 2)
    w2 = torch.randn(num_experts, intermediate, hidden, device=device).transpose(1, 2)
    weights, ids = torch.rand(num_tokens, num_experts, device=device).topk(topk)
    slots, offsets = torch.ops.compile_moe.sort_tokens(ids, num_experts)
    rows = torch.ops.compile_moe.gather_gemm(x, w1, slots, offsets, topk)
    half = torch.randn(num_tokens * topk, intermediate, device=device)
    return {
        "sort_tokens": (ids, num_experts),
        "gather_gemm": (x, w1, slots, offsets, topk),
        "act_and_mul": (rows, "concatenated; t0 = sigmoid(gate); t1 = mul(t0, up); return t1"),
        "scatter_gemm": (half, w2, slots, offsets, num_tokens, topk),
        "weight_and_reduce": (torch.randn(num_tokens, topk, hidden, device=device), weights),
        "fused_moe": (x, w1, w2, weights, ids),
    }


def test_ops() -> None:
    """Found by pytest: ``pytest opcheck_in_your_tests.py``."""
    for name, arguments in my_inputs().items():
        results = torch.library.opcheck(getattr(torch.ops.compile_moe, name).default, arguments)
        print(f"compile_moe::{name}: {', '.join(results)}")
    print(f"all ops of compile_moe {compile_moe.__version__} pass")


def main() -> None:
    test_ops()


if __name__ == "__main__":
    main()
