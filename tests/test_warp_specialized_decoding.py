"""The warp-specialized GEMMs on weights of 4 and 8 bits: when they are chosen, what is launched, results on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels.quantized import tiles
from compile_moe.ops.kernels.quantized.tiles import pays_from, tile_choice
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_TILES,
    Tile,
)
from compile_moe.ops.kernels.warp_specialized import decoding_launches, row_tiles
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.quantized_format import weight_format
from tests.support.quantized import Variant, make_quantized
from tests.support.quantized_gemms import GEMMS, Gemms
from tests.support.warp_specialized import (
    HOPPER,
    LAYERS,
    assert_each_number_of_rows_runs_right,
    assert_right_with_other_routing,
    assert_runs_right,
    each_with_a_tile,
    on_hopper,
    warp_specialized_wherever_possible,
)
from tests.test_few_rows import VARIANTS, assert_every_number
from tests.test_kernels_ahead_of_time import compile_launch

KERNELS = dict(zip(GEMMS, ("decoding_gather_gemm_kernel", "decoding_scatter_gemm_kernel"), strict=True))
GEMM_KERNELS = set(KERNELS.values())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (row_tiles, tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)


def candidates(
    variant: Variant,
    k: int = 512,
    n: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype | None = None,
    slots: int = 512,
    **changed: Tensor,
) -> Any:
    scheme = variant.made
    scale_dtype = scheme.scale_dtype or scale_dtype or dtype
    tensors = {
        "x": torch.empty(64, k, dtype=dtype),
        "w": torch.empty(*scheme.weight_shape(4, n, k), dtype=torch.uint8),
        "w_scale": torch.empty(*scheme.scale_shape(4, n, k), dtype=scale_dtype),
        "out": torch.empty(slots, n, dtype=dtype),
    } | changed
    return tile_choice(**tensors, weight_format=weight_format(scheme.text), gated=False)


def test_who_can_run_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def can(variant: Variant, **changed: Any) -> bool:
        return WARP_SPECIALIZED in candidates(variant, **changed).candidates

    assert all(can(variant) for variant in VARIANTS.values())
    int4, mxfp4, int8 = (VARIANTS[name] for name in ("int4_w4a16", "mxfp4_w4a16", "int8_w8a16"))
    assert can(int4, dtype=torch.float16) and not can(mxfp4, dtype=torch.float16)
    assert not can(int4, scale_dtype=torch.float32) and can(int8, scale_dtype=torch.float32)
    # Groups that a step has some of, or that have some steps.
    assert not can(Variant("int4_w4a16", (("group_size", 16),)))
    assert not can(Variant("int4_w4a16", (("group_size", 96),)), k=96 * 4)
    # What TMA reads, and rows of the result in pieces of 16 bytes.
    assert can(int8, k=272, n=136) and not can(int8, k=264) and not can(int8, n=132)
    assert not can(int8, w=torch.empty(4, 512, 128, dtype=torch.uint8).transpose(1, 2))
    assert not can(int8, w=torch.empty(1, 128, 512, dtype=torch.uint8).expand(4, -1, -1))
    assert not can(int8, x=torch.empty(64, 1024, dtype=torch.bfloat16)[:, ::2])
    assert not can(int8, x=torch.empty(64, 516, dtype=torch.bfloat16)[:, 4:])
    assert can(int8, slots=0, x=torch.empty(0, 512, dtype=torch.bfloat16))
    monkeypatch.setattr(tiles, "device_limits", lambda index: HOPPER._replace(warp_specialized=False))
    assert not can(int8)


def test_from_so_many_rows_on(hopper: None) -> None:
    for variant in VARIANTS.values():
        special_from = pays_from(weight_format(variant.made.text))
        enough = 4 * min(special_from.values())
        few, many = (candidates(variant, slots=slots) for slots in (enough - 1, enough))
        assert few.tile.block_m == 32 and not few.tile.warp_specialized
        assert few.candidates == many.candidates
        for tile, rows in special_from.items():
            assert candidates(variant, slots=4 * rows + 1).tile == tile


#: Scheme, activation, whether biased, dtype, bytes that may be spilled.
AHEAD_OF_TIME = [
    ("int8_w8a16", "silu", False, torch.float16, 4),
    ("int4, zero points", "swigluoai", True, torch.bfloat16, 112),
    ("mxfp4_w4a16", "relu2_no_mul", True, torch.bfloat16, 8),
]


#: The tile that takes most registers with all of them, the smaller ones with what takes most.
CASES_AHEAD = [
    *((WARP_SPECIALIZED, *case) for case in AHEAD_OF_TIME),
    *((tile, *AHEAD_OF_TIME[1]) for tile in WARP_SPECIALIZED_TILES if tile is not WARP_SPECIALIZED),
]


@pytest.mark.parametrize("tile, variant, activation, biased, dtype, spills", CASES_AHEAD)
def test_ahead_of_time(
    hopper: None, tile: Tile, variant: str, activation: str, biased: bool, dtype: torch.dtype, spills: int
) -> None:
    """Both GEMMs, within registers and shared memory."""
    layer = {"M": 256, "K": 1024, "I": 512, "E": 2, "biased": biased, "activation": activation}
    q = make_quantized(VARIANTS[variant], **layer, dtype=dtype)
    inputs = Gemms(q).inputs
    form, program = weight_format(q.variant.made.text), parse(program_text(activation))
    x, _, w, scale, zeros, slots, offsets, topk, *_ = inputs[GEMMS[0]]
    scratch, out = row_tiles.scratch(slots, w.size(0)), torch.empty(slots.size(0), 512, dtype=dtype)
    first = decoding_launches.gather_launches_for(
        tile, scratch, out, x, w, scale, zeros, slots, offsets, topk, form, q.layer.w1_bias,
        program.triton_source(), program.layout,
    )  # fmt: skip
    x, _, w, scale, zeros, *_ = inputs[GEMMS[1]]
    out = torch.empty(slots.size(0), 1024, dtype=dtype)
    second = decoding_launches.scatter_launches_for(
        tile, scratch, out, x, w, scale, zeros, slots, offsets, form, q.layer.w2_bias
    )
    for stage, launches in zip(GEMMS, (first, second), strict=True):
        assert [each.kernel.__name__ for each in launches] == ["row_tiles_kernel", KERNELS[stage]]
        assert compile_launch(launches[1], 90, spills if tile is WARP_SPECIALIZED else 0).has_wgmma


@pytest.fixture(params=WARP_SPECIALIZED_TILES, ids=lambda tile: str(tile.block_m))
def always(request: pytest.FixtureRequest) -> Iterator[None]:
    with warp_specialized_wherever_possible(request.param):
        yield


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, variant, always",
    each_with_a_tile([name for name in LAYERS if not LAYERS[name].get("transposed")], VARIANTS),
    indirect=["always"],
)
def test_layer(case: str, variant: str, always: None) -> None:
    """Sizes in multiples of 32, which weights of two a byte need."""
    layer = {**LAYERS[case], **{name: -(-LAYERS[case][name] // 32) * 32 for name in "KI"}}
    assert_runs_right(make_quantized(VARIANTS[variant], **layer, dtype=torch.bfloat16), GEMM_KERNELS)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["int8_w8a16", "int4, zero points", "mxfp4_w4a16"])
def test_every_kind_of_tile(variant: str, always: None) -> None:
    assert_each_number_of_rows_runs_right(VARIANTS[variant], GEMM_KERNELS, K=1184, I=352, biased=True)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["int8_w8a16", "int4_w4a16", "int8, zero points"])
def test_float16(variant: str, always: None) -> None:
    layer = {"M": 700, "K": 512, "I": 544, "E": 8, "biased": True}
    assert_runs_right(make_quantized(VARIANTS[variant], **layer, dtype=torch.float16), GEMM_KERNELS)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number(variant: str, always: None) -> None:
    dtype = torch.bfloat16 if VARIANTS[variant].made.powers_of_two else torch.float16
    assert_every_number(VARIANTS[variant], 256, dtype, KERNELS[GEMMS[0]])


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number_in_bfloat16(variant: str) -> None:
    with warp_specialized_wherever_possible():
        assert_every_number(VARIANTS[variant], 256, torch.bfloat16, KERNELS[GEMMS[0]])


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["int8_w8a16", "mxfp4_w4a16"])
def test_replays_with_other_routing(variant: str, always: None) -> None:
    q = make_quantized(VARIANTS[variant], M=1024, K=256, I=128, E=8, dtype=torch.bfloat16)
    assert_right_with_other_routing(q)
