"""A Mixture-of-Experts block under torch.compile: one graph, one compile for every number of tokens."""

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe


class Block(nn.Module):
    """RMSNorm, router, experts, residual."""

    def __init__(
        self, hidden: int = 64, intermediate: int = 128, num_experts: int = 8, topk: int = 2
    ) -> None:
        super().__init__()
        self.topk = topk
        self.norm = nn.RMSNorm(hidden)
        self.router = nn.Linear(hidden, num_experts, bias=False)
        # Gate rows first, then up rows.
        self.w1 = nn.Parameter(torch.randn(num_experts, 2 * intermediate, hidden) * hidden**-0.5)
        self.w2 = nn.Parameter(torch.randn(num_experts, hidden, intermediate) * intermediate**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        topk_weights, topk_ids = self.router(h).softmax(-1, dtype=torch.float32).topk(self.topk)
        return x + compile_moe.fused_experts(h, self.w1, self.w2, topk_weights, topk_ids)


@torch.no_grad()
def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block = Block().to(device)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for num_tokens in (16, 2, 333, 1024):
        x = torch.randn(num_tokens, 64, device=device)
        # Without this mark the second number of tokens compiles once more.
        torch._dynamo.mark_dynamic(x, 0)
        difference = (compiled(x) - block(x)).abs().max().item()
        print(f"{num_tokens:5} tokens: largest difference from eager {difference:.1e}")
    print(f"compiled {counter.frame_count} time(s) on {device}")


if __name__ == "__main__":
    main()
