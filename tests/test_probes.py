"""Another inductor than the library knows: results stay right, and one warning says what is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import compile_moe
import compile_moe.lowering
from compile_moe.cli import app
from compile_moe.lowering import inductor_compat
from compile_moe.lowering.fusion_warning import FusionWarning
from compile_moe.ops import act_and_mul, quantize_tokens, reduce_batch, weight_and_reduce
from tests.support.other_inductor import (
    Without,
    assert_right,
    has_another,
    lacks,
    right_with_warnings,
    unregistered,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "nothing_registered")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def nothing_registered() -> Iterator[None]:
    with unregistered():
        yield


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
        "ir.Reduction.create(device, dst_dtype, src_dtype, inner_fn, ranges, reduction_ranges, reduction_type)": (
            has_another("ir.Reduction", SimpleNamespace(create=takes_other_arguments))
        ),
        "ir.TensorBox": lacks("ir.TensorBox"),
        "ir.View.create": lacks("ir.View.create"),
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
    """Its op is called; a warning for each of the four."""
    compile_moe.lowering.register()
    if when == "while lowering":
        has_another("ir.Pointwise", SimpleNamespace(create=takes_other_arguments))(monkeypatch)
    else:
        other = Without(inductor_compat.ops, "to_dtype")
        names = "act_and_mul", "weighted_sum", "quantize_tokens"
        for module in (getattr(compile_moe.lowering, name) for name in names):
            monkeypatch.setattr(module, "ops", other)
    messages = right_with_warnings()
    ops = act_and_mul, quantize_tokens, reduce_batch, weight_and_reduce
    for op, message in zip(ops, sorted(messages), strict=True):
        assert message.startswith(f"compile_moe: the lowering of {op} raised ")
    refusals = explained(lambda x: weight_and_reduce(x, x[:, :, 0]) + 1, torch.ones(3, 2, 8))
    assert any(str(weight_and_reduce) in refusal and "raised" in refusal for refusal in refusals), refusals


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
