"""Inductor's caches on disk never return what other sources compiled; its passes go along with the user's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import compile_moe
from compile_moe.lowering import graph_passes, inductor_compat
from compile_moe.ops import gather_gemm
from tests.support.oracle import assert_as_accurate, make_layer

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import torch
from torch._dynamo.utils import counters
{before}
import compile_moe
from compile_moe.ops import act_and_mul, weight_and_reduce
torch.manual_seed(0)
fused, weights, gate_up = torch.ones(3, 2, 8), torch.ones(3, 2), torch.ones(3, 8)
text = "concatenated; t0 = mul(gate, up); return t0"
function = torch.compile(lambda f, w, g: (weight_and_reduce(f, w) + 1, act_and_mul(g, text) + 1))
print([t.unique().tolist() for t in function(fused, weights, gate_up)])
print("hits", counters["inductor"]["fxgraph_cache_hit"])
"""


KERNEL_PROGRAM = """
import torch
from torch._dynamo.utils import counters
import compile_moe
from compile_moe.ops import scatter_gemm, sort_tokens
slots, offsets = sort_tokens(torch.zeros(3, 2, dtype=torch.int64, device="cuda"), 1)
activated, w2 = (torch.ones(shape, dtype=torch.bfloat16, device="cuda") for shape in ((6, 64), (1, 64, 64)))
function = torch.compile(lambda x, w: scatter_gemm(x, w, slots, offsets, 3, 2) + 1)
print(function(activated, w2).unique().tolist())
print("hits", counters["inductor"]["fxgraph_cache_hit"])
"""


def run(library: Path, caches: Path, before: str = "", program: str = PROGRAM) -> list[str]:
    path = os.pathsep.join([str(library), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    done = subprocess.run(
        [sys.executable, "-c", program.format(before=before)],
        cwd=caches,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "compile_moe", tmp_path / "library" / "compile_moe")
    return tmp_path / "library"


def test_changed_sources_are_not_served_from_a_cache(library: Path, tmp_path: Path) -> None:
    assert run(library, tmp_path) == ["[[3.0], [2.0]]", "hits 0"]
    assert run(library, tmp_path) == ["[[3.0], [2.0]]", "hits 1"]
    path = library / "compile_moe/lowering/weighted_sum.py"
    source, old = path.read_text(), "ops.add(total, term)"
    assert old in source
    path.write_text(source.replace(old, "ops.sub(total, term)"))
    assert run(library, tmp_path) == ["[[1.0], [2.0]]", "hits 0"]


@pytest.mark.parametrize(
    "file", ["ops/act_and_mul.py", "ops/kernels/weight_and_reduce.py", "lowering/weighted_sum.py"]
)
def test_every_source_counts(library: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Those of fakes, of kernels, whose launches are none of what inductor compiles, and of lowerings."""
    source_hash = graph_passes.source_hash.__wrapped__
    here = source_hash()
    monkeypatch.setattr(graph_passes, "__file__", str(library / "compile_moe/lowering/graph_passes.py"))
    assert source_hash() == here
    path = library / "compile_moe" / file
    path.write_text(path.read_text() + "#")
    assert source_hash() != here


@pytest.mark.gpu
def test_a_changed_kernel_runs(library: Path, tmp_path: Path) -> None:
    """Neither inductor nor Triton hands out what was compiled of its sources before."""
    assert run(library, tmp_path, program=KERNEL_PROGRAM) == ["[65.0]", "hits 0"]
    assert run(library, tmp_path, program=KERNEL_PROGRAM) == ["[65.0]", "hits 1"]
    path = library / "compile_moe/ops/kernels/scatter_gemm.py"
    source, old = path.read_text(), "acc.to(out_ptr.dtype.element_ty)"
    assert source.count(old) == 1
    path.write_text(source.replace(old, f"(2 * {old})"))
    assert run(library, tmp_path, program=KERNEL_PROGRAM) == ["[129.0]", "hits 0"]


def test_imported_after_something_compiled(library: Path, tmp_path: Path) -> None:
    compiled_before = "torch.compile(lambda x: x.softmax(-1) + 1)(torch.ones(3))"
    assert run(library, tmp_path, compiled_before)[0] == "[[3.0], [2.0]]"


class UsersPass(CustomGraphPass):
    def __init__(self, identity: Any = "users") -> None:
        self.identity = identity
        self.graphs = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs += 1

    def uuid(self) -> Any:
        return self.identity


def overridden_activation(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return gate.tanh() * up


def compile_layer(**options: Any) -> None:
    layer = make_layer(M=5, function=overridden_activation)

    class OwnActivation(compile_moe.TritonExperts):
        def activation(self, activation: Any, output: torch.Tensor, input: torch.Tensor) -> None:
            output.copy_(overridden_activation(input))

    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), OwnActivation())
    graphs = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        passes = *graph_passes.PASSES, lambda graph: graphs.append([node.target for node in graph.nodes])
        patch.setattr(graph_passes, "PASSES", passes)
        assert_as_accurate(torch.compile(kernel, fullgraph=True, **options)(*layer.args), layer)
    trial, graph = graphs
    assert trial == graph and gather_gemm in graph and torch.ops.aten.tanh.default not in graph


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["set before", "set after", "options"])
def test_with_a_pass_of_the_users(how: str) -> None:
    users = UsersPass()
    with inductor_config.patch(post_grad_custom_pre_pass=None, force_disable_caches=True):
        if how == "set before":
            inductor_config.post_grad_custom_pre_pass = users
        graph_passes.register()
        if how == "set after":
            inductor_config.post_grad_custom_pre_pass = users
        compile_layer(**({"options": {"post_grad_custom_pre_pass": users}} if how == "options" else {}))
    assert users.graphs == 1


def test_identity_in_the_caches() -> None:
    def ours(*others: Any) -> Any:
        return inductor_compat._Passes((), "ours", others).uuid()

    assert ours() == ("ours",)
    assert ours(UsersPass()) == ("ours", "users")
    assert ours(UsersPass(None)) is None, "asks for no caching"
    assert ours(lambda graph: None) is None, "says nothing"


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiling_in_threads() -> None:
    layers = [make_layer(M=3 + i, K=16 + 8 * i) for i in range(4)]
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            results[index] = torch.compile(compile_moe.fused_experts, fullgraph=True)(*layers[index].args)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(layers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, layer in enumerate(layers):
        assert_as_accurate(results[index], layer)
