"""What each quantization scheme costs in accuracy: a layer's output against that of its unquantized weights in float64,
for weights drawn from a normal distribution and from one with heavy tails.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe

SCHEMES = {
    "fp8_w8a8_tensor": {},
    "fp8_w8a8_channel": {},
    "fp8_w8a8_block": {},
    "int8_w8a8_channel": {},
    "int8_w8a16": {},
    "int4_w4a16": {"group_size": 128},
    "mxfp4_w4a16": {},
}


def unquantized(x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """In float64, every expert on every token."""
    x, w1, w2, weights = (t.double() for t in (x, w1, w2, weights))
    gate, up = torch.einsum("mk,enk->men", x, w1).chunk(2, dim=-1)
    every = torch.einsum("mei,eki->mek", F.silu(gate) * up, w2)
    return (weights.unsqueeze(-1) * every[torch.arange(len(x)).unsqueeze(1), ids.cpu()]).sum(1)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    num_tokens, hidden, intermediate, num_experts, topk = 64, 512, 256, 8, 2
    x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, device=device)
    weights, ids = torch.randn(num_tokens, num_experts, device=device).softmax(-1).topk(topk)
    student = torch.distributions.StudentT(3.0)  # a few weights ten times as large as most
    print(f"{'scheme':20} {'normal':>8} {'heavy tails':>12}   relative error of the output, L2 norm")
    for scheme in ("bfloat16", *SCHEMES):
        errors = []
        for draw in (torch.randn, lambda *shape: student.sample(shape) / 3**0.5):
            w1 = (draw(num_experts, 2 * intermediate, hidden) * hidden**-0.5).to(device, torch.bfloat16)
            w2 = (draw(num_experts, hidden, intermediate) * intermediate**-0.5).to(device, torch.bfloat16)
            expected = unquantized(x, w1, w2, weights, ids)
            if scheme == "bfloat16":
                result = compile_moe.fused_experts(x, w1, w2, weights, ids)
            else:
                sizes = SCHEMES[scheme]
                q1, q2 = (compile_moe.quantize_weights(w, scheme, **sizes) for w in (w1, w2))
                config = compile_moe.FusedMoEQuantConfig(
                    scheme, **sizes, w1_scale=q1.scale, w2_scale=q2.scale
                )
                result = compile_moe.fused_experts(x, q1.weight, q2.weight, weights, ids, quant_config=config)
            errors.append(float((result - expected).norm() / expected.norm()))
        print(f"{scheme:20} {errors[0]:8.4f} {errors[1]:12.4f}")


if __name__ == "__main__":
    main()
