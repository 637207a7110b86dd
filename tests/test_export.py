"""torch.export and AOTInductor of a model with the layer; the package runs where compile_moe is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compile_moe

ROOT = Path(__file__).resolve().parent.parent
K, I, E, TOPK = 32, 24, 6, 2

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """RMSNorm, router, experts, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.router = nn.Linear(K, E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, 2 * I, K) * K**-0.5, requires_grad=False)
        self.w2 = nn.Parameter(torch.randn(E, K, I) * I**-0.5, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, ids = compile_moe.routers.softmax_topk(self.router(h), TOPK, renormalize=True)
        return x + compile_moe.fused_experts(h, self.w1, self.w2, weights, ids)


def export(device: str) -> tuple[Block, torch.export.ExportedProgram]:
    block = Block().to(device).requires_grad_(False)
    dynamic = {"x": {0: torch.export.Dim("M", min=2, max=4096)}}
    with torch.no_grad():
        return block, torch.export.export(block, (torch.randn(9, K, device=device),), dynamic_shapes=dynamic)


def test_export(device: str, tmp_path: Path) -> None:
    block, program = export(device)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for num_tokens in (2, 9, 300):
        x = torch.randn(num_tokens, K, device=device)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), block(x))


RUN = """
import sys, torch, compile_moe
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
print("ran")
"""


def test_aot_inductor(device: str, tmp_path: Path) -> None:
    block, program = export(device)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        inputs = [torch.randn(num_tokens, K, device=device) for num_tokens in (2, 9, 300)]
        torch.save([(x, block(x)) for x in inputs], tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN, package, str(tmp_path / "cases.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran"
