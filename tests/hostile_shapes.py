"""Every kernel on hostile shapes, for compute-sanitizer; a program rather than a test:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.hostile_shapes

Without the caching allocator each tensor is an allocation of its own, so that an overrun of one is seen.
"""

from __future__ import annotations

import itertools
import sys

import torch

import compile_moe
from compile_moe.ops import act_and_mul
from compile_moe.ops.named_activations import program_text
from tests.support.oracle import CASES, assert_as_accurate, make_layer

SIZES = (
    {},
    {"M": 1, "K": 1, "I": 1},
    {"M": 33, "K": 65, "I": 17},
    {"M": 700, "K": 129, "I": 31, "E": 9, "topk": 7},
)


def main() -> int:
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return 2
    count = 0
    for (name, case), dtype in itertools.product(CASES.items(), (torch.bfloat16, torch.float32)):
        for size in (
            SIZES if name in ("plain", "transposed", "biased", "mapped", "skipped", "strided") else ({},)
        ):
            layer = make_layer(**{**case, **size}, dtype=dtype, device="cuda")
            assert_as_accurate(compile_moe.fused_experts(*layer.args, **layer.options), layer)
            count += 1
    for columns in (2, 34, 2050):
        act_and_mul(torch.randn(3, columns, device="cuda"), program_text("silu"))
    # More slots than one launch sorts, and ids far out of range.
    layer = make_layer(M=3000, K=16, I=16, E=300, topk=3, device="cuda")
    layer.topk_ids[::7] = 2**40
    layer.topk_ids[1::7] = -(2**40)
    compile_moe.fused_experts(*layer.args)
    torch.cuda.synchronize()
    print(f"{count} layers ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
