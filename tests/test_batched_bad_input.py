"""Parts in the batched format that don't fit, each other or the layer: what they say, eager, fake and compiled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from compile_moe import (
    BatchedPrepareAndFinalize,
    BatchedTorchExperts,
    BatchedTritonExperts,
    FusedMoEModularKernel,
    FusedMoEQuantConfig,
    MoEPrepareAndFinalizeNoEP,
    TorchExperts,
    TritonExperts,
)
from tests.support.oracle import make_layer

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS = 7


class Returning(BatchedPrepareAndFinalize):
    """Whatever it is told instead of what it prepared."""

    def __init__(self, change: Callable[..., Any], **options: Any) -> None:
        super().__init__(ROWS, **options)
        self.change = change

    def prepare(self, *args: Any) -> Any:
        return self.change(*super().prepare(*args)[:3])


INT8 = FusedMoEQuantConfig("int8_w8a8_channel")


def prepared_by(change: Callable[..., Any]) -> Callable[[], FusedMoEModularKernel]:
    return lambda: FusedMoEModularKernel(Returning(change), BatchedTritonExperts(ROWS))


class Unbatched(MoEPrepareAndFinalizeNoEP):
    """Prepares a batch, and leaves finalize as it is."""

    def prepare(self, a1: Tensor, *args: Any) -> Any:
        return a1.new_zeros(5, ROWS, 48), None, torch.zeros(5, dtype=torch.int32)


class WrongShape(BatchedTritonExperts):
    def apply(self, *args: Any, **options: Any) -> Tensor:
        return super().apply(*args, **options)[:, 1:]


class Whole(BatchedTritonExperts):
    def apply(self, *args: Any, **options: Any) -> Tensor:
        return super().apply(*args, **options)


def pair(parts: Callable[[], Any], experts: Callable[[], Any]) -> Callable[[], FusedMoEModularKernel]:
    return lambda: FusedMoEModularKernel(parts(), experts())


# What doesn't fit, on a layer of M = 9, K = 48, E = 5, topk = 2.
# fmt: off
MISFITS: dict[str, tuple[Callable[[], FusedMoEModularKernel], type[Exception], str]] = {
    "batch-for-triton": (pair(lambda: BatchedPrepareAndFinalize(7), TritonExperts), ValueError,
        r"TritonExperts takes tokens \(M, K\) without .*got \(5, 7, 48\) with them; .*BatchedTritonExperts"),
    "batch-for-torch": (pair(lambda: BatchedPrepareAndFinalize(7), TorchExperts), ValueError,
        r"TorchExperts takes tokens \(M, K\) without .*got \(5, 7, 48\) with them; .*BatchedTorchExperts"),
    "tokens-for-triton": (pair(MoEPrepareAndFinalizeNoEP, lambda: BatchedTritonExperts(7)), ValueError,
        r"BatchedTritonExperts takes the batched format.*got \(9, 48\) without expert_num_tokens; prepare must"),
    "tokens-for-torch": (pair(MoEPrepareAndFinalizeNoEP, lambda: BatchedTorchExperts(7)), ValueError,
        r"BatchedTorchExperts takes the batched format.*got \(9, 48\) without expert_num_tokens; .*Batched"),
    "other-capacity": (pair(lambda: BatchedPrepareAndFinalize(7), lambda: BatchedTritonExperts(8)), ValueError,
        r"max_num_tokens = 8, as BatchedTritonExperts was constructed, got \(5, 7, 48\); construct both"),
    "no-counts": (prepared_by(lambda a, s, n: (a, s, None)), ValueError,
        r"batched format.*got \(5, 7, 48\) without expert_num_tokens"),
    "counts-2d": (prepared_by(lambda a, s, n: (a, s, n[None])), ValueError,
        r"expert_num_tokens must be \(E,\) = \(5,\), got \(1, 5\)"),
    "counts-fewer": (prepared_by(lambda a, s, n: (a, s, n[:4])), ValueError,
        r"expert_num_tokens must be \(E,\) = \(5,\), got \(4,\)"),
    "counts-float": (prepared_by(lambda a, s, n: (a, s, n.float())), TypeError,
        r"expert_num_tokens must be int32 or int64, got torch.float32"),
    "counts-list": (prepared_by(lambda a, s, n: (a, s, [1, 2, 3])), TypeError,
        r"expert_num_tokens must be a tensor or None, got list"),
    "counts-elsewhere": (prepared_by(lambda a, s, n: (a, s, n.to("meta"))), ValueError,
        r"expert_num_tokens must be on the device of hidden_states, cpu, got meta"),
    "experts-fewer": (prepared_by(lambda a, s, n: (a[:4], s, n[:4])), ValueError,
        r"batched hidden states must be \(E=5, max_num_tokens, K\), got \(4, 7, 48\)"),
    "K-narrow": (prepared_by(lambda a, s, n: (a[:, :, :8], s, n)), ValueError, r"must agree in K, got \(5, 7, 8\)"),
    "tokens-after-all": (prepared_by(lambda a, s, n: (a[0, :0].new_zeros(9, 48), None, None)), ValueError,
        r"Returning prepared \(9, 48\), but its finalize is for batches \(E, max_num_tokens, K\); override"),
    "finalize-of-tokens": (pair(Unbatched, lambda: BatchedTritonExperts(7)), ValueError,
        r"Unbatched prepared \(5, 7, 48\), but its finalize is for tokens \(M, K\); override finalize"),
    "a-batch-for-finalize-of-tokens": (pair(Unbatched, lambda: Whole(7)), ValueError,
        r"apply must return \(M, topk, K\) = \(9, 2, 48\), got \(5, 7, 48\)"),
    "scale-2d": (lambda: FusedMoEModularKernel(
            Returning(lambda a, s, n: (a, s.flatten(0, 1), n), quant_config=INT8),
            BatchedTritonExperts(7, quant_config=INT8)), ValueError,
        r"a1q_scale must be \(5, 7, 'scales of a token'\), or \(1,\) for all, got \(35, 1\)"),
    "result-of-another-shape": (pair(lambda: BatchedPrepareAndFinalize(7), lambda: WrongShape(7)), ValueError,
        r"apply must return \(E, max_num_tokens, K\) = \(5, 7, 48\), got \(5, 6, 48\)"),
    "other-experts": (pair(lambda: BatchedPrepareAndFinalize(7, 4), lambda: BatchedTritonExperts(7)), ValueError,
        r"num_local_experts must be the number of experts, 5, where there is no expert_map, got 4"),
    "two-configs": (pair(lambda: BatchedPrepareAndFinalize(7, quant_config=INT8), lambda: BatchedTritonExperts(7)),
        ValueError, r"BatchedTritonExperts without a quant_config .*takes no a1q_scale"),
}
# fmt: on


@pytest.fixture
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback of everything that raises inside a fake."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.parametrize("case", MISFITS)
def test_misfits(case: str, quiet_fakes: None) -> None:
    """Refused by the fake in the same words."""
    make, kind, message = MISFITS[case]
    layer = make_layer()
    with pytest.raises(kind, match=message) as real:
        make()(*layer.args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(kind) as fake:
        make()(*tree_map_only(Tensor, mode.from_tensor, layer.args))
    assert str(fake.value) == str(real.value)


@pytest.mark.parametrize("case", ["batch-for-triton", "tokens-for-triton", "other-capacity", "no-counts"])
def test_misfits_compiled(case: str) -> None:
    make, _, _ = MISFITS[case]
    with pytest.raises(Exception, match=r"(?s)\(M, K\)|batched format|construct both"):
        torch.compile(make(), fullgraph=True, backend="aot_eager")(*make_layer().args)


def test_an_expert_map_needs_the_number_of_local_experts() -> None:
    layer = make_layer(mapped=True)
    kernel = FusedMoEModularKernel(BatchedPrepareAndFinalize(7), BatchedTritonExperts(7))
    with pytest.raises(ValueError, match="num_local_experts must be given where there is an expert_map"):
        kernel(*layer.args, expert_map=layer.expert_map)


@pytest.mark.parametrize("make", [BatchedPrepareAndFinalize, BatchedTritonExperts, BatchedTorchExperts])
@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (0, ValueError, "max_num_tokens must be at least 1, got 0"),
        (7.0, TypeError, "max_num_tokens must be an int, got float"),
        (None, TypeError, "max_num_tokens must be an int, got NoneType"),
        (2**31, ValueError, "fewer than 2.31 - 1 rows"),
    ],
)
def test_capacities(make: Callable[..., Any], given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(given)


@pytest.mark.parametrize("given", [0, 1.5])
def test_numbers_of_local_experts(given: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="num_local_experts must be"):
        BatchedPrepareAndFinalize(7, given)


def test_finalize_without_prepare() -> None:
    layer = make_layer()
    parts = BatchedPrepareAndFinalize(18)
    kernel = FusedMoEModularKernel(parts, BatchedTritonExperts(18))
    kernel(*layer.args)
    _, _, _, weights, ids = layer.args
    with pytest.raises(RuntimeError, match="BatchedPrepareAndFinalize finalizes what it prepared, once"):
        parts.finalize(torch.zeros(9, 48), torch.zeros(5, 18, 48), weights, ids, False)
    parts.prepare(layer.hidden_states, None, None, weights, ids, 5, None, False)
    with pytest.raises(ValueError, match=r"output must be \(M, K\) = \(9, 48\), got \(9, 47\)"):
        parts.finalize(torch.zeros(9, 47), torch.zeros(5, 18, 48), weights, ids, False)
