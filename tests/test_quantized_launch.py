"""Launchers of the quantized GEMMs on a simulated GPU, and which tiles and devices they take."""

from __future__ import annotations

import pytest
import torch

from compile_moe.ops import quantized_gather_gemm, quantized_scatter_gemm
from compile_moe.ops.kernels.quantized.few_rows.launches import FewRowsTile
from compile_moe.ops.kernels.quantized.operands import steps_of
from compile_moe.ops.kernels.quantized.tiles import tile_candidates
from compile_moe.ops.kernels.tiles import DeviceLimits
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import SCHEMES
from tests.support.launchers import launch
from tests.support.quantized import VARIANTS, Quantized, Variant, make_quantized
from tests.support.quantized_gemms import DEFAULTS, GEMMS, Gemms
from tests.support.simulated_gpu import simulated_gpu

OPS = dict(zip(GEMMS, (quantized_gather_gemm, quantized_scatter_gemm), strict=True))


def launch_both(q: Quantized) -> None:
    for stage, arguments in Gemms(q).inputs.items():
        launch(OPS[stage], *arguments)


@pytest.mark.parametrize("variant", DEFAULTS)
def test_other_token_counts_compile_nothing(variant: str) -> None:
    shape = {"K": 128, "I": 128, "E": 4, "dtype": torch.bfloat16}
    base = make_quantized(DEFAULTS[variant], M=7, **shape)
    with simulated_gpu() as gpu:
        launch_both(base)
        loaded = list(gpu.loaded)
        few_rows = DEFAULTS[variant].made.decode_words is not None
        names = {f"{stage}_kernel" for stage in GEMMS}
        if few_rows:
            names = {name.replace("quantized", "few_rows") for name in names}
        assert set(gpu.launched) == names
        assert 2 <= len(loaded) <= (10 if few_rows else 12)
        gpu.capturing = True
        for m in (1, 2, 16, 17, 64, 300, 1000):
            other = make_quantized(DEFAULTS[variant], M=m, **shape)
            other.q1, other.q2 = base.q1, base.q2
            launch_both(other)
            assert gpu.loaded == loaded, f"M = {m} loaded another variant"


def test_no_tokens_launch_nothing() -> None:
    with simulated_gpu() as gpu:
        launch_both(make_quantized(VARIANTS["int8_w8a16"], M=0))
        assert gpu.launched == []


@pytest.mark.parametrize("memory", [64 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("variant", DEFAULTS)
def test_tiles_shrink_with_shared_memory(variant: str, memory: int) -> None:
    scheme = DEFAULTS[variant].made
    sizes = 1 if scheme.token_scaling else 2, scheme.weight_dtype.itemsize
    form, limits = weight_format(scheme.text), DeviceLimits(memory, False)
    for for_few_rows in (False, True):
        candidates = tile_candidates(*sizes, 2048, 768, form, for_few_rows, True, limits)
        assert 1 <= len(candidates) <= 6 and all(tile.num_stages >= 2 for tile in candidates)
        ordinary = [tile for tile in candidates if not isinstance(tile, FewRowsTile)]
        assert all(steps_of(tile.block_k, form)[0] == tile.block_k for tile in ordinary)


@pytest.mark.parametrize("group", [1, 2, 7, 24, 32, 40, 96, 128, 200, 256, 1000])
@pytest.mark.parametrize("scheme", ["int8_w8a16", "fp8_w8a8_block"])
def test_a_step_meets_no_group_in_its_middle(scheme: str, group: int) -> None:
    """Or, where scales multiply weights, only whole groups."""
    size = ("group_size", group) if scheme == "int8_w8a16" else ("block_shape", (128, group))
    form = weight_format(Variant(scheme, (size,)).made.text)
    for block_k in (32, 64, 128):
        step, aligned = steps_of(block_k, form)
        assert 32 <= step <= block_k
        if aligned:
            assert group % step == 0 or (step % group == 0 and not form.scales_sums)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_say_how_they_are_multiplied(scheme: str) -> None:
    """Tokens and weights as they are stored, with scales for the same groups; or weights decoded."""
    made = SCHEMES[scheme]()
    scaling = made.token_scaling
    assert (made.decode is None) == (scaling is not None)
    if scaling is not None:
        assert made.packed == 1 and scaling.dtype is made.weight_dtype
        if scaling.per == "group":
            assert scaling.group_size == made.scale_block[1]
