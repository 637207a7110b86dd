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
from compile_moe.lowering import fuse_epilogue, graph_passes, inductor_compat
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


def run(library: Path, caches: Path, before: str = "") -> list[str]:
    environment = {**os.environ, "PYTHONPATH": str(library), "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
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


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        # A lowering.
        ("lowering/weight_and_reduce.py", "ops.add(total, term)", "ops.sub(total, term)", "[[1.0], [2.0]]"),
        # A shared shape function: what the fake says.
        ("ops/act_and_mul.py", "gate_up.dtype),", "gate_up.double().dtype),", "[[3.0], [2.0]]"),
    ],
    ids=["lowering", "fake"],
)
def test_changed_sources_are_not_served_from_a_cache(
    library: Path, tmp_path: Path, file: str, old: str, new: str, expected: str
) -> None:
    before = run(library, tmp_path)
    assert before == ["[[3.0], [2.0]]", "hits 0"]
    assert run(library, tmp_path) == ["[[3.0], [2.0]]", "hits 1"]
    path = library / "compile_moe" / file
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))
    assert run(library, tmp_path) == [expected, "hits 0"]


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
    fused = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fuse_epilogue, "_fuse", lambda *args, _fuse=fuse_epilogue._fuse: (_fuse(*args), fused.append(1))
        )
        assert_as_accurate(torch.compile(kernel, fullgraph=True, **options)(*layer.args), layer)
    assert fused == [1]


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


PROBES_FAIL = """
import sys, warnings
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._inductor.custom_graph_pass":
            raise ImportError("no such thing")
import torch, torch._inductor.codecache
saved = sys.modules.pop("torch._inductor.custom_graph_pass")
sys.meta_path.insert(0, Finder())
import compile_moe
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import compile_moe.lowering
    compile_moe.lowering.register()
    compile_moe.lowering.register()
sys.modules["torch._inductor.custom_graph_pass"] = saved
print(len([w for w in caught if "stay opaque" in str(w.message)]))
x, w1, w2 = torch.randn(5, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
weights, ids = torch.rand(5, 3).topk(2)
with torch.no_grad():
    given = torch.compile(compile_moe.fused_experts, fullgraph=True)(x, w1, w2, weights, ids)
    torch.testing.assert_close(given, compile_moe.fused_experts(x, w1, w2, weights, ids))
print("right")
"""


def test_right_without_what_is_private(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROBES_FAIL],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "right"]
