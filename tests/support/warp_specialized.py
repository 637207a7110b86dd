"""The warp-specialized GEMMs wherever they can run, whatever is faster, and layers that they can run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import compile_moe
from compile_moe.ops.kernels import launch, remembered_calls, tuned_tiles
from compile_moe.ops.kernels.quantized import tiles as quantized_tiles
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_FROM,
    WARP_SPECIALIZED_TILES,
    DeviceLimits,
    Tile,
)
from compile_moe.ops.kernels.warp_specialized import descriptors
from tests.support.quantized import Quantized, Variant, assert_as_accurate, make_quantized

HOPPER = DeviceLimits(227 * 1024, async_mma=True, warp_specialized=True)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs sm_90"
)

#: Arguments of make_layer, with at least 64 rows an expert.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"M": 700, "K": 512, "I": 256, "E": 8},
    "interleaved, biased": {"M": 900, "K": 192, "I": 320, "E": 6, "biased": True, "activation": "swigluoai"},
    "ungated": {"M": 600, "K": 320, "I": 136, "E": 4, "activation": "relu2_no_mul"},
    "odd sizes": {"M": 801, "K": 136, "I": 72, "E": 5, "biased": True},
    "skipped, mapped": {"M": 1200, "K": 128, "I": 64, "E": 4, "topk": 3, "skipped": True, "mapped": True},
    "all on one expert": {"M": 1500, "K": 256, "I": 128, "E": 8, "topk": 1, "routing": "one"},
    "empty experts": {"M": 900, "K": 256, "I": 128, "E": 8, "routing": "empty"},
    "one expert": {"M": 289, "K": 64, "I": 64, "E": 1, "topk": 1},
    "many experts": {"M": 4096, "K": 256, "I": 128, "E": 128, "topk": 8},
    "transposed, interleaved, biased": {
        "M": 900,
        "K": 192,
        "I": 320,
        "E": 6,
        "biased": True,
        "activation": "swigluoai",
        "transposed": True,
    },
    "transposed, ungated": {
        "M": 600,
        "K": 320,
        "I": 136,
        "E": 4,
        "activation": "relu2_no_mul",
        "transposed": True,
    },
    "transposed, odd sizes": {
        "M": 801,
        "K": 136,
        "I": 72,
        "E": 5,
        "activation": "swigluoai",
        "transposed": True,
    },
    "strided": {"M": 700, "K": 256, "I": 128, "E": 8, "strided": True},
}
#: The same, with sizes in multiples of 16.
EIGHT_BIT_LAYERS = {
    name: {**layer, "K": -(-layer["K"] // 16) * 16, "I": -(-layer["I"] // 16) * 16}
    for name, layer in LAYERS.items()
    if not layer.get("transposed")
}


def each_with_a_tile(first: Iterable[str], second: Iterable[str]) -> list[Any]:
    """Parameters ``first, second, always``, of which every two meet: a kernel takes up to a minute to compile."""
    first, second, tiles = list(first), list(second), WARP_SPECIALIZED_TILES
    assert min(len(first), len(second)) >= len(tiles)
    return [
        pytest.param(a, b, tiles[(i + j) % len(tiles)], id=f"{a}-{b}-{tiles[(i + j) % len(tiles)].block_m}")
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


@contextmanager
def warp_specialized_wherever_possible(tile: Tile = WARP_SPECIALIZED) -> Iterator[None]:
    """The choice of tiles takes them from the fewest rows with which they can run; nothing is remembered.

    Args:
        tile: which of them.
    """
    remembered_calls.forget()
    with ExitStack() as patches:
        special_from = {tile: WARP_SPECIALIZED_FROM}
        patches.enter_context(
            mock.patch.object(tuned_tiles, "warp_specialized_from", lambda *_: special_from)
        )
        for name in ("DECODING_PAYS_FROM", "ROWS_PAY_FROM", "BLOCKS_PAY_FROM"):
            patches.enter_context(mock.patch.object(quantized_tiles, name, special_from))
        patches.enter_context(mock.patch.object(remembered_calls, "_MOST_BYTES", 0))
        for cache in ("_ready", "_loaded"):
            patches.enter_context(mock.patch.object(launch, cache, {}))
        yield
    remembered_calls.forget()


@contextmanager
def few_programs() -> Iterator[None]:
    """So few that they get most tiles from the counter. Before the first launch."""
    limits = descriptors.device_limits
    with mock.patch.object(
        descriptors, "device_limits", lambda index: limits(index)._replace(multiprocessors=3)
    ):
        yield


def launched() -> list[str]:
    """Names of kernels since then."""
    return [each.compiled.name for ready in launch._ready.values() for each in ready]


def assert_right_with_other_routing(q: Quantized) -> None:
    """By replays of one CUDA graph; also with every slot skipped: no row tile at all."""
    args, options = q.on_gpu()
    graph = torch.cuda.CUDAGraph()
    with few_programs():
        compile_moe.fused_experts(*args, **options)
        with torch.cuda.graph(graph):
            out = compile_moe.fused_experts(*args, **options)
    tokens, topk = args[4].shape
    for ids in (
        torch.randint(0, 8, (tokens, topk)),
        torch.full((tokens, topk), 3),
        torch.full((tokens, topk), -1),
    ):
        q.layer.topk_ids.copy_(ids)
        args[4].copy_(ids)
        out.fill_(torch.nan)
        graph.replay()
        assert_as_accurate(out.cpu(), q)


def assert_runs_right(q: Quantized, kernels: set[str]) -> None:
    """An eager layer, by these kernels, with the same result each time."""
    args, options = q.on_gpu()
    launch._ready.clear()
    first = compile_moe.fused_experts(*args, **options)
    assert_as_accurate(first.cpu(), q)
    assert kernels <= set(launched())
    for _ in range(2):
        assert torch.equal(compile_moe.fused_experts(*args, **options), first)


def assert_each_number_of_rows_runs_right(variant: Variant, kernels: set[str], **layer: Any) -> None:
    for m in (64, 90, 128, 150, 200, 256, 285, 512, 600):
        try:
            assert_runs_right(
                make_quantized(variant, M=m, E=1, topk=1, dtype=torch.bfloat16, **layer), kernels
            )
        except AssertionError as error:
            error.add_note(f"with {m} rows")
            raise


def assert_both_were_launched() -> None:
    """Both GEMMs, since the tiles were forced."""
    names = launched()
    assert names.count("row_tiles_kernel") >= 2, names
