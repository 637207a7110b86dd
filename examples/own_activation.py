"""Activations: by name, with parameters, and written by you; pointwise ones run inside the first GEMM."""

import torch
import torch.nn.functional as F
from torch import Tensor

import compile_moe


def clamped_geglu(gate_up: Tensor) -> Tensor:
    """Pointwise over gate and up: becomes the epilogue of the first GEMM."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate.clamp(max=4.0)) * up.clamp(-4.0, 4.0)


def normalised_gate(gate_up: Tensor) -> Tensor:
    """Looks at a whole row: runs as PyTorch between the two GEMMs."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate / gate.norm(dim=-1, keepdim=True).clamp(min=1e-6)) * up


class MyExperts(compile_moe.TritonExperts):
    """The published way: override the method, and it is called instead of any epilogue."""

    def activation(self, activation: object, output: Tensor, input: Tensor) -> None:
        gate, up = input.chunk(2, dim=-1)
        torch.mul(gate.relu(), up, out=output)


def reference(function: object, x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Token by token."""
    rows = []
    for token in range(x.size(0)):
        outputs = [w2[e] @ function(w1[e] @ x[token]) for e in ids[token].tolist()]  # type: ignore[operator]
        rows.append(sum(weight * y for weight, y in zip(weights[token], outputs, strict=True)))
    return torch.stack(rows)  # type: ignore[arg-type]


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    num_tokens, hidden, intermediate, num_experts, topk = 8, 32, 48, 4, 2
    x = torch.randn(num_tokens, hidden, device=device)
    w1 = torch.randn(num_experts, 2 * intermediate, hidden, device=device) * hidden**-0.5
    w2 = torch.randn(num_experts, hidden, intermediate, device=device) * intermediate**-0.5
    weights, ids = torch.randn(num_tokens, num_experts, device=device).softmax(-1).topk(topk)

    def limited(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)

    for name, activation, function in (
        ("a record", compile_moe.Activation("silu", limit=1.0), limited),
        ("a pointwise function", clamped_geglu, clamped_geglu),
        ("a function of rows", normalised_gate, normalised_gate),
    ):
        layer = torch.compile(compile_moe.fused_experts, fullgraph=True)
        result = layer(x, w1, w2, weights, ids, activation=activation)
        torch.testing.assert_close(result, reference(function, x, w1, w2, weights, ids), rtol=1e-3, atol=1e-3)
        print(f"{name}: as computed token by token")

    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), MyExperts())
    expected = reference(lambda g: g.chunk(2, -1)[0].relu() * g.chunk(2, -1)[1], x, w1, w2, weights, ids)
    torch.testing.assert_close(kernel(x, w1, w2, weights, ids), expected, rtol=1e-3, atol=1e-3)
    print("an overridden method: as computed token by token")


if __name__ == "__main__":
    main()
