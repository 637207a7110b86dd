"""torch.export and AOTInductor of a model with the layer; the package runs where compile_moe is imported."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compile_moe

ROOT = Path(__file__).resolve().parent.parent
K, I, E, TOPK = 32, 24, 6, 2
NUM_GLOBAL = 2 * E  # where there is an expert_map

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def leaky_gate(gate_up: Tensor) -> Tensor:
    """No activation that has a name."""
    gate, up = gate_up.chunk(2, -1)
    return F.leaky_relu(gate.clamp(max=2), 0.1) * (up + 1)


def softmax_topk(logits: Tensor) -> tuple[Tensor, Tensor]:
    return compile_moe.routers.softmax_topk(logits, TOPK, renormalize=True)


def written_out(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' classes write it."""
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(TOPK)
    return weights / weights.sum(-1, keepdim=True), ids


class Block(nn.Module):
    """RMSNorm, router, experts, residual."""

    def __init__(self, with_options: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.router = nn.Linear(K, NUM_GLOBAL if with_options else E, bias=False)
        self.w1 = nn.Parameter(torch.randn(E, 2 * I, K) * K**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, K, I) * I**-0.5)
        self.route = written_out if with_options else softmax_topk
        self.options: dict[str, Any] = {}
        if with_options:
            self.w1_bias, self.w2_bias = nn.Parameter(torch.randn(E, 2 * I)), nn.Parameter(torch.randn(E, K))
            self.expert_map = nn.Buffer(torch.cat([torch.full((NUM_GLOBAL - E,), -1), torch.arange(E)]))
            self.options = {"activation": leaky_gate}

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, ids = self.route(self.router(h))
        tensors = {name: getattr(self, name, None) for name in ("w1_bias", "w2_bias", "expert_map")}
        y = compile_moe.fused_experts(h, self.w1, self.w2, weights, ids, **tensors, **self.options)
        return x + y


def export(device: str, with_options: bool) -> tuple[Block, torch.export.ExportedProgram]:
    block = Block(with_options).to(device).requires_grad_(False)
    dynamic = {"x": {0: torch.export.Dim("M", min=2, max=4096)}}
    with torch.no_grad():
        return block, torch.export.export(block, (torch.randn(9, K, device=device),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "options"])
def test_export(with_options: bool, device: str, tmp_path: Path) -> None:
    block, program = export(device, with_options)
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for num_tokens in (2, 9, 300):
        x = torch.randn(num_tokens, K, device=device)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), block(x))


class Batched(nn.Module):
    """In the batched format, with its counter as a result."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, 2 * I, K) * K**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, K, I) * I**-0.5)
        self.parts = compile_moe.BatchedPrepareAndFinalize(4)
        self.kernel = compile_moe.FusedMoEModularKernel(self.parts, compile_moe.BatchedTritonExperts(4))

    def forward(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        y = self.kernel(x, self.w1, self.w2, *softmax_topk(logits))
        return y, self.parts.num_dropped


def test_export_of_the_batched_format(device: str) -> None:
    block = Batched().to(device).requires_grad_(False)
    inputs = torch.randn(9, K, device=device), torch.randn(9, E, device=device)
    with torch.no_grad():
        m = torch.export.Dim("M", min=2, max=4096)
        program = torch.export.export(block, inputs, dynamic_shapes={"x": {0: m}, "logits": {0: m}})
        # Tracing leaves a tensor without memory in the block.
        assert copy.deepcopy(block).parts.num_dropped is None
        for num_tokens in (2, 9, 300):
            given = torch.randn(num_tokens, K, device=device), torch.randn(num_tokens, E, device=device)
            for result, expected in zip(program.module()(*given), block(*given), strict=True):
                torch.testing.assert_close(result, expected)


RUN = """
import sys, torch, compile_moe
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
print("ran")
"""


@pytest.mark.parametrize("with_options", [False, True], ids=["plain", "options"])
def test_aot_inductor(with_options: bool, device: str, tmp_path: Path) -> None:
    block, program = export(device, with_options)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        inputs = [torch.randn(num_tokens, K, device=device) for num_tokens in (2, 9, 300)]
        torch.save([(x, block(x)) for x in inputs], tmp_path / "cases.pt")
    done = run_package(package, tmp_path)
    if (
        done.returncode < 0 and run_package(linear_layer(device, tmp_path), tmp_path).returncode < 0
    ):  # by a signal
        pytest.skip("AOTInductor's loader crashes here for a linear layer, too")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran"


def run_package(package: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Load it in another process, and compare with the cases that ``folder`` has."""
    return subprocess.run(
        [sys.executable, "-c", RUN, package, str(folder / "cases.pt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def linear_layer(device: str, folder: Path) -> str:
    """A package with nothing of ours, and its case."""
    layer, x = torch.nn.Linear(K, K, device=device), torch.randn(9, K, device=device)
    with torch.no_grad():
        torch.save([(x, layer(x))], folder / "cases.pt")
        program = torch.export.export(layer, (x,))
        return torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "linear.pt2"))
