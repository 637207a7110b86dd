"""An inductor that is another than the library knows, as the library sees it; and whether results stay right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import lowering as inductor_lowering

import compile_moe
from compile_moe.lowering import fusion_warning, inductor_compat
from compile_moe.lowering.fusion_warning import FusionWarning
from compile_moe.ops import act_and_mul, quantize_tokens, reduce_batch, weight_and_reduce
from compile_moe.ops.named_activations import program_text
from tests.support.oracle import assert_as_accurate, make_layer


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


@contextmanager
def unregistered() -> Iterator[None]:
    """As in a process that has not compiled the ops yet, and nothing of it is left to other tests."""
    dicts = ("lowerings", "_maybe_layout_constraints", "user_lowerings")
    known = [getattr(inductor_lowering, name) for name in dicts if hasattr(inductor_lowering, name)]
    uncached = torch._functorch.config.patch(enable_autograd_cache=False)
    with inductor_config.patch(post_grad_custom_pre_pass=None, fx_graph_cache=False), uncached:
        patches = [mock.patch.dict(dictionary) for dictionary in known]
        for patch in patches:
            patch.start()
        for op in (act_and_mul, weight_and_reduce, reduce_batch, quantize_tokens):
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

    def stages(fused_out: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
        finalized = weight_and_reduce(fused_out * 2, weights, ids, torch.arange(3), 3) + 1
        rows = torch.arange(14, dtype=torch.int32).view(7, 2) - 1
        gathered = reduce_batch(fused_out * 2, weights, rows) + 1
        activated = act_and_mul(gate_up + 1, text) * 2
        return finalized, gathered, activated, *quantize_tokens(gate_up * 2, "int8 per token")

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
