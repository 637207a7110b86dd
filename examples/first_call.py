"""How long the first call takes in a fresh process: eager and compiled, with empty and filled caches, if it has any."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import compile_moe


@torch.no_grad()
def time_first_call(compiled: bool) -> float:
    """Seconds of the first call of RMSNorm, router, experts and residual in the shape of Qwen3-30B-A3B, 16 tokens."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    hidden, intermediate, num_experts, topk = 2048, 768, 128 if device == "cuda" else 16, 8
    factory = {"device": device, "dtype": dtype}
    w1 = torch.randn(num_experts, 2 * intermediate, hidden, **factory)
    w2 = torch.randn(num_experts, hidden, intermediate, **factory)
    norm = torch.nn.RMSNorm(hidden, **factory)
    router = torch.nn.Linear(hidden, num_experts, bias=False, **factory)

    def block(x: torch.Tensor) -> torch.Tensor:
        h = norm(x)
        topk_weights, topk_ids = router(h).softmax(-1, dtype=torch.float32).topk(topk)
        return x + compile_moe.fused_experts(h, w1, w2, topk_weights, topk_ids)

    x = torch.randn(16, hidden, **factory)
    norm(x)  # the device's own start is not ours
    function = torch.compile(block, fullgraph=True) if compiled else block
    start = time.perf_counter()
    function(x)[0, 0].item()
    return time.perf_counter() - start


def main() -> None:
    if sys.argv[1:]:
        print(time_first_call(sys.argv[1] == "compiled"))
        return
    for what in ("eager", "compiled"):
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor"))}
            # Eager calls compile kernels for GPUs only.
            for state in ("cold", "warm") if what == "compiled" or torch.cuda.is_available() else ("no",):
                command = [sys.executable, __file__, what]
                done = subprocess.run(
                    command, env={**os.environ, **caches}, stdout=subprocess.PIPE, text=True, check=True
                )
                print(f"first {what} call, {state} caches: {float(done.stdout):.1f} s")


if __name__ == "__main__":
    main()
