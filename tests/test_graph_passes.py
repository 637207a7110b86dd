"""A pass that raises, by a bug of ours, leaves the graph as it was; a warning says so, and explain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx

import compile_moe
import compile_moe.lowering
from compile_moe.lowering import graph_passes
from compile_moe.lowering.fusion_warning import FusionWarning
from compile_moe.lowering.inductor_compat import GraphFunction
from compile_moe.ops import weight_and_reduce
from tests.support.oracle import make_layer
from tests.support.other_inductor import OwnActivation, overridden, right_with_warnings, unregistered

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "nothing_registered")


@pytest.fixture
def nothing_registered() -> Iterator[None]:
    with unregistered():
        yield


def raises_at_once(graph: fx.Graph) -> None:
    raise KeyError("val")


def raises_in_between(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if node.op == "call_function":
            node.replace_all_uses_with(node.all_input_nodes[0], lambda user: user.op == "output")
            break
    raise KeyError("val")


@pytest.mark.parametrize(
    ("position", "bad"),
    [(0, raises_at_once), *((i, raises_in_between) for i in range(len(graph_passes.PASSES) + 1))],
)
def test_a_pass_that_raises(position: int, bad: GraphFunction, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("broken", [graph_pass.__name__ for graph_pass in graph_passes.PASSES])
def test_a_pass_of_ours_that_raises(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each of them first reads the graph."""
    passes = {p.__name__: p for p in graph_passes.PASSES}

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
