"""Another inductor than the library knows, and bugs of ours: results stay right, and one warning says what is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config
from torch._inductor import lowering as inductor_lowering
from typer.testing import CliRunner

import compile_moe
import compile_moe.lowering
from compile_moe.cli import app
from compile_moe.lowering import fusion_warning, graph_passes, inductor_compat
from compile_moe.lowering.fuse_epilogue import fuse_epilogue
from compile_moe.lowering.fuse_router import fuse_router, fuse_router_and_sort
from compile_moe.lowering.fusion_warning import FusionWarning
from compile_moe.ops import act_and_mul, weight_and_reduce
from compile_moe.ops.named_activations import program_text
from tests.support.oracle import assert_as_accurate, make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "unregistered")

ROOT = Path(__file__).resolve().parent.parent


class Without:
    """A module or class that lacks some names, or has others in their place."""

    def __init__(self, whole: Any, *lacking: str, **others: Any) -> None:
        vars(self).update(_whole=whole, _lacking=lacking, **others)

    def __getattr__(self, name: str) -> Any:
        if name in self._lacking:
            raise AttributeError(name)
        return getattr(self._whole, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._whole, name, value)


def lacks(path: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A torch without ``path``, as inductor_compat sees it."""
    module, *between, last = path.split(".")

    def simulate(patch: pytest.MonkeyPatch) -> None:
        whole = getattr(inductor_compat, module)
        if between:
            (owner,) = between
            lacking = Without(whole, **{owner: Without(getattr(whole, owner), *last.split("|"))})
        else:
            lacking = Without(whole, last)
        patch.setattr(inductor_compat, module, lacking)

    return simulate


def has_another(path: str, other: Any) -> Callable[[pytest.MonkeyPatch], None]:
    module, name = path.split(".")
    return lambda patch: patch.setattr(
        inductor_compat, module, Without(getattr(inductor_compat, module), **{name: other})
    )


def takes_other_arguments(*, device: Any, inner_fn: Any, shape: Any) -> Any:
    raise AssertionError("a call of it raises")


#: What is wrong with torch, by the name of the probe that finds it.
SIMULATED = {
    "lowerings": {
        "lowering.register_lowering(op, type_promotion_kind=None)": has_another(
            "inductor_lowering.register_lowering", lambda aten_fn, *, promote=None: lambda function: None
        ),
        "lowering.fallback_handler(op, add_to_fallback_set=False)": lacks(
            "inductor_lowering.fallback_handler"
        ),
        "ir.Pointwise.create(device, dtype, inner_fn, ranges)": has_another(
            "ir.Pointwise", SimpleNamespace(create=takes_other_arguments)
        ),
        "sizevars.SizeVarAllocator.guard_int or .evaluate_static_shape": lacks(
            "sizevars.SizeVarAllocator.guard_int|evaluate_static_shape"
        ),
        "virtualized.V": lacks("virtualized.V"),
    },
    "passes": {
        "config.post_grad_custom_pre_pass": lacks("config.post_grad_custom_pre_pass"),
        "custom_graph_pass.CustomGraphPass": lacks("custom_graph_pass.CustomGraphPass"),
    },
    "explain": {
        name: lacks(name)
        for name in (
            *("config.patch", "config._post_fusion_custom_pass", "config.compile_threads"),
            *("config.fx_graph_cache", "config.shape_padding", "graph.GraphLowering.compile_to_module"),
            *("graph.GraphLowering.codegen", "graph.GraphLowering.codegen_with_cpp_wrapper"),
            *("scheduler.BaseSchedulerNode.get_nodes", "scheduler.BaseSchedulerNode.is_extern"),
            *("scheduler.NopKernelSchedulerNode", "ir.Operation.get_origins", "ir.MultiOutput"),
        )
    }
    | {
        "torch._functorch.config.enable_autograd_cache": lambda patch: patch.setattr(
            torch._functorch, "config", Without(torch._functorch.config, "enable_autograd_cache")
        )
    },
}
FUSION = [(what, name) for what in ("lowerings", "passes") for name in SIMULATED[what]]


@pytest.fixture
def unregistered() -> Iterator[None]:
    """As in a process that has not compiled the ops yet, and nothing of it is left to other tests."""
    dicts = ("lowerings", "_maybe_layout_constraints", "user_lowerings")
    known = [getattr(inductor_lowering, name) for name in dicts if hasattr(inductor_lowering, name)]
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with inductor_config.patch(post_grad_custom_pre_pass=None, fx_graph_cache=False), uncached:
        patches = [mock.patch.dict(dictionary) for dictionary in known]
        for patch in patches:
            patch.start()
        for op in (act_and_mul, weight_and_reduce):
            for dictionary in known:
                dictionary.pop(op, None)
        registered, warned = set(inductor_compat._registered), set(fusion_warning._warned)
        inductor_compat._registered.clear()
        fusion_warning._warned.clear()
        inductor_compat.missing.cache_clear()
        yield
        inductor_compat.missing.cache_clear()
        inductor_compat._registered.clear()
        inductor_compat._registered.update(registered)
        fusion_warning._warned.clear()
        fusion_warning._warned.update(warned)
        for patch in patches:
            patch.stop()


def overridden(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate.tanh() * up


class OwnActivation(compile_moe.TritonExperts):
    def activation(self, activation: Any, output: Tensor, input: Tensor) -> None:
        output.copy_(overridden(input))


def assert_right() -> None:
    """A layer of user's parts, and the ops that have lowerings, on strided inputs and between neighbours."""
    layer = make_layer(M=5, skipped=True, function=overridden)
    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), OwnActivation())
    fused_out, gate_up = torch.randn(2, 7, 8).transpose(0, 1), torch.randn(8, 3).t()
    weights, ids = torch.rand(7, 2), torch.tensor([[0, -1]] * 7)
    text = program_text("swigluoai")

    def stages(fused_out: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        finalized = weight_and_reduce(fused_out * 2, weights, ids, torch.arange(3), 3) + 1
        return finalized, act_and_mul(gate_up + 1, text) * 2

    arguments = fused_out, weights, ids, gate_up
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            assert_as_accurate(torch.compile(kernel, fullgraph=True)(*layer.args), layer)
            torch.testing.assert_close(
                torch.compile(stages, fullgraph=True)(*arguments), stages(*arguments), rtol=1e-5, atol=1e-6
            )


def right_with_warnings() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_right()
    return [str(warning.message) for warning in caught if warning.category is FusionWarning]


def test_each_probe_is_simulated() -> None:
    assert {what: set(probes) for what, probes in SIMULATED.items()} == {
        what: set(probes) for what, probes in inductor_compat._PROBES.items()
    }


def test_right_without_warnings() -> None:
    assert_right()
    assert inductor_compat.missing_for_fusion() == () and inductor_compat.missing("explain") is None


@pytest.mark.parametrize(("what", "name"), FUSION, ids=[name for _, name in FUSION])
def test_right_without(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SIMULATED[what][name](monkeypatch)
    (message,) = right_with_warnings()
    assert name in message and inductor_compat._WITHOUT[what] in message


def test_right_without_anything_private(monkeypatch: pytest.MonkeyPatch) -> None:
    for what, name in FUSION:
        SIMULATED[what][name](monkeypatch)
    (message,) = right_with_warnings()
    assert all(name in message for _, name in FUSION)


@pytest.mark.parametrize("name", SIMULATED["explain"])
def test_explain_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SIMULATED["explain"][name](monkeypatch)
    with pytest.raises(NotImplementedError) as raised:
        compile_moe.explain(lambda x: x + 1, torch.ones(3))
    assert f"another inductor than this version knows, without {name}" in str(raised.value)


def test_the_command_without_what_explain_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    SIMULATED["explain"]["config.patch"](monkeypatch)
    sizes = ("--hidden-size=64", "--intermediate-size=32", "--num-experts=8", "--topk=2")
    result = CliRunner().invoke(app, ["explain", "--device", "cpu", *sizes])
    assert result.exit_code == 2 and f"error: torch {torch.__version__} has another inductor" in result.output


def test_explain_when_the_scheduler_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its objects have some names, so that no probe finds out."""
    from torch._inductor.scheduler import SchedulerNode

    monkeypatch.setattr(SchedulerNode, "get_nodes", lambda self: [SimpleNamespace()])
    with pytest.raises(NotImplementedError, match="whose scheduler raised AttributeError"):
        compile_moe.explain(lambda x: x + 1, torch.ones(3))


def explained(function: Callable[..., Any], *arguments: Any) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusionWarning)
        return compile_moe.explain(function, *arguments).refusals


@pytest.mark.parametrize("when", ["while lowering", "while evaluating elements"])
def test_a_lowering_that_raises(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its op is called; a warning for each of the two."""
    compile_moe.lowering.register()
    if when == "while lowering":
        has_another("ir.Pointwise", SimpleNamespace(create=takes_other_arguments))(monkeypatch)
    else:
        other = Without(inductor_compat.ops, "to_dtype")
        for module in (compile_moe.lowering.act_and_mul, compile_moe.lowering.weight_and_reduce):
            monkeypatch.setattr(module, "ops", other)
    messages = right_with_warnings()
    for op, message in zip((weight_and_reduce, act_and_mul), messages, strict=True):
        assert message.startswith(f"compile_moe: the lowering of {op} raised ")
    refusals = explained(lambda x: weight_and_reduce(x, x[:, :, 0]) + 1, torch.ones(3, 2, 8))
    assert any(str(weight_and_reduce) in refusal and "raised" in refusal for refusal in refusals), refusals


def raises_at_once(graph: fx.Graph) -> None:
    raise KeyError("val")


def raises_in_between(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function":
            node.replace_all_uses_with(node.all_input_nodes[0], lambda user: user.op == "output")
            break
    raise KeyError("val")


@pytest.mark.parametrize("bad", [raises_at_once, raises_in_between])
@pytest.mark.parametrize("position", range(len(graph_passes.PASSES) + 1))
def test_a_pass_that_raises(
    position: int, bad: inductor_compat.GraphFunction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others run; those before it are not undone."""
    passes = list(graph_passes.PASSES)
    passes.insert(position, bad)
    monkeypatch.setattr(graph_passes, "PASSES", tuple(passes))
    (message,) = right_with_warnings()
    assert message.startswith(f"compile_moe: the pass {bad.__name__} raised KeyError: 'val'; ")
    layer = make_layer(function=overridden)
    kernel = compile_moe.FusedMoEModularKernel(compile_moe.MoEPrepareAndFinalizeNoEP(), OwnActivation())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusionWarning)
        kernels, refusals = compile_moe.explain(kernel, *layer.args)
    assert refusals == (f"the pass {bad.__name__} raised KeyError: 'val'",)
    assert [kernel.epilogue != "" for kernel in kernels].count(True) == 1


@pytest.mark.parametrize("broken", ["fuse_router", "fuse_router_and_sort", "fuse_epilogue"])
def test_a_pass_of_ours_that_raises(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them first reads the graph."""
    passes = {p.__name__: p for p in (fuse_router, fuse_router_and_sort, fuse_epilogue)}
    assert tuple(passes.values()) == graph_passes.PASSES

    def find_nodes(graph: fx.Graph, **options: Any) -> Any:
        raise RuntimeError("find_nodes")

    def with_another_graph(graph: fx.Graph) -> None:
        with mock.patch.object(fx.Graph, "find_nodes", find_nodes):
            passes[broken](graph)

    with_another_graph.__name__ = broken
    monkeypatch.setattr(
        graph_passes,
        "PASSES",
        tuple(with_another_graph if name == broken else p for name, p in passes.items()),
    )
    (message,) = right_with_warnings()
    assert message.startswith(f"compile_moe: the pass {broken} raised RuntimeError: find_nodes")


def test_warnings_fail_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """In these tests, nothing falls back in silence: not even the second time."""
    monkeypatch.setattr(graph_passes, "PASSES", (raises_at_once,))
    for _ in range(2):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="the pass raises_at_once raised"):
            torch.compile(lambda x: weight_and_reduce(x, x[:, :, 0]) + 1)(torch.ones(3, 2, 8))


def test_a_graph_of_others_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_passes, "PASSES", (raises_at_once,))
    compile_moe.lowering.register()
    assert torch.compile(lambda x: x + 1)(torch.ones(3)).tolist() == [2, 2, 2]


IMPORT_FAILS = """
import sys, warnings
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch._inductor.{module}":
            raise ImportError("no such thing")
import torch, torch._inductor.compile_fx, torch._inductor.{module}
saved = sys.modules.pop("torch._inductor.{module}")
sys.meta_path.insert(0, Finder())
import compile_moe
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import compile_moe.lowering
    compile_moe.lowering.register()
    compile_moe.lowering.register()
sys.modules["torch._inductor.{module}"] = saved
print(len([w for w in caught if "another inductor" in str(w.message)]))
x, w1, w2 = torch.randn(5, 8), torch.randn(3, 8, 8), torch.randn(3, 8, 4)
weights, ids = torch.rand(5, 3).topk(2)
with torch.no_grad():
    given = torch.compile(compile_moe.fused_experts, fullgraph=True)(x, w1, w2, weights, ids)
    torch.testing.assert_close(given, compile_moe.fused_experts(x, w1, w2, weights, ids))
print("right")
"""


@pytest.mark.parametrize("module", ["custom_graph_pass", "virtualized"])
def test_right_without_a_module(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_FAILS.format(module=module)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "right"]
