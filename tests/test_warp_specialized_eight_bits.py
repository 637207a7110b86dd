"""The warp-specialized GEMMs on 8 bits: when they are chosen, what is launched, and results on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compile_moe.ops import quantized_gather_gemm, quantized_scatter_gemm
from compile_moe.ops.kernels.launch import loading_everything
from compile_moe.ops.kernels.quantized import tiles
from compile_moe.ops.kernels.quantized.tiles import pays_from, tile_choice
from compile_moe.ops.kernels.tiles import WARP_SPECIALIZED_TILES
from compile_moe.ops.kernels.warp_specialized import row_tiles
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import SCHEMES
from tests.support.launchers import launch
from tests.support.quantized import Quantized, Variant, make_quantized
from tests.support.quantized_gemms import GEMMS, Gemms
from tests.support.simulated_gpu import simulated_gpu
from tests.support.warp_specialized import (
    EIGHT_BIT_LAYERS,
    HOPPER,
    assert_each_number_of_rows_runs_right,
    assert_right_with_other_routing,
    assert_runs_right,
    each_with_a_tile,
    on_hopper,
    warp_specialized_wherever_possible,
)

PER_ROW, PER_TENSOR = Variant("fp8_w8a8_channel"), Variant("fp8_w8a8_tensor")
INT8 = Variant("int8_w8a8_channel")


def per_block(*shape: int) -> Variant:
    return Variant("fp8_w8a8_block", (("block_shape", shape),))


PER_BLOCK = per_block(128, 128)
EIGHT_BITS = {"row": PER_ROW, "block": PER_BLOCK, "int8": INT8}
OPS = dict(zip(GEMMS, (quantized_gather_gemm, quantized_scatter_gemm), strict=True))
GEMM_KERNELS = {"eight_bit_gather_gemm_kernel", "eight_bit_scatter_gemm_kernel"}
#: Of both GEMMs, which here write zeros to slots that are skipped.
KERNELS = [
    kernel for gemm in sorted(GEMM_KERNELS) for kernel in ("row_tiles_kernel", gemm, "zero_skipped_kernel")
]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (row_tiles, tiles):
        monkeypatch.setattr(module, "device_limits", lambda index: HOPPER)


def launch_both(q: Quantized) -> None:
    for stage, arguments in Gemms(q).inputs.items():
        launch(OPS[stage], *arguments)


def test_who_can_run_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemes whose scales belong to whole rows or to a step's 128 columns, of sizes that TMA reads."""

    def last(
        scheme: str,
        k: int = 256,
        n: int = 128,
        dtype: torch.dtype = torch.float8_e4m3fn,
        gated: bool = False,
        **sizes: Any,
    ) -> Any:
        x, w = torch.empty(64, k, dtype=dtype), torch.empty(4, n, k, dtype=dtype)
        out = torch.empty(128, n, dtype=torch.bfloat16)
        scheme_format = weight_format(SCHEMES[scheme](**sizes).text)
        return tile_choice(x, w, torch.empty(4, n, 1), out, scheme_format, gated).candidates[-1]

    def special(*args: Any, **options: Any) -> bool:
        return last(*args, **options) in WARP_SPECIALIZED_TILES

    assert special("fp8_w8a8_channel") and special("fp8_w8a8_tensor")
    assert special("int8_w8a8_channel", dtype=torch.int8)
    assert special("fp8_w8a8_channel", k=272, n=136)
    assert not special("fp8_w8a8_channel", k=264) and not special("fp8_w8a8_channel", n=132)
    assert special("fp8_w8a8_block") and special("fp8_w8a8_block", block_shape=(256, 128))
    assert special("fp8_w8a8_block", n=192, gated=True)
    assert not special("fp8_w8a8_block", n=208, gated=True)
    assert not special("fp8_w8a8_block", block_shape=(64, 128))
    assert not special("fp8_w8a8_block", block_shape=(128, 64))
    assert not special("fp8_w8a8_block", block_shape=(128, 256))
    monkeypatch.setattr(tiles, "device_limits", lambda index: HOPPER._replace(warp_specialized=False))
    assert not special("fp8_w8a8_channel")


@pytest.mark.parametrize("variant", [PER_ROW, PER_BLOCK], ids=["row", "block"])
def test_tiles_of_64_rows_up_to_there(hopper: None, variant: Variant) -> None:
    w, scale = torch.empty(4, 128, 256, dtype=torch.float8_e4m3fn), torch.empty(4, 128, 1)

    def chosen(slots: int) -> Any:
        x, out = torch.empty(64, 256, dtype=w.dtype), torch.empty(slots, 128, dtype=torch.bfloat16)
        return tile_choice(x, w, scale, out, weight_format(variant.made.text), False)

    special_from = pays_from(weight_format(variant.made.text))
    enough = min(special_from.values()) * 4
    assert [chosen(slots).tile.block_m for slots in (16, 4 * 24, 4 * 25, enough - 1)] == [16, 32, 64, 64]
    for tile, rows in special_from.items():
        assert chosen(rows * 4).tile == tile
    assert chosen(16).candidates == chosen(enough).candidates


@pytest.mark.parametrize("variant", [PER_ROW, PER_BLOCK], ids=["row", "block"])
def test_launches(hopper: None, variant: Variant) -> None:
    """A list of row tiles, then the GEMM, from enough rows on; other numbers of tokens load nothing."""
    shape = {"K": 128, "I": 64, "E": 4, "topk": 2, "dtype": torch.bfloat16}
    enough = min(pays_from(weight_format(variant.made.text)).values()) * 4 // 2
    q, other, few = (make_quantized(variant, M=m, **shape) for m in (enough, enough + 88, enough - 1))
    other.q1, other.q2 = few.q1, few.q2 = q.q1, q.q2
    with simulated_gpu() as gpu:
        launch_both(q)
        assert gpu.launched == KERNELS
        gpu.capturing = True
        launch_both(q)
        launch_both(other)
        assert gpu.launched == KERNELS * 3
        # Tokens of each call, and the weights that a descriptor is of.
        assert gpu.arguments[1][1].size(0) == enough and gpu.arguments[13][1].size(0) == enough + 88
        assert gpu.arguments[13][2].base is q.q1.weight
        gpu.launched.clear()
        gpu.capturing = False
        launch_both(few)
        assert gpu.launched == [f"{stage}_kernel" for stage in GEMMS]


@pytest.mark.parametrize("m", [0, 1])
def test_the_warm_up_loads_them(hopper: None, m: int) -> None:
    shape = {"K": 128, "I": 64, "E": 4, "topk": 2, "dtype": torch.bfloat16}
    first, many = (make_quantized(PER_ROW, M=tokens, **shape) for tokens in (m, 600))
    many.q1, many.q2 = first.q1, first.q2
    with simulated_gpu() as gpu:
        with loading_everything():
            launch_both(first)
        gpu.capturing = True
        gpu.launched.clear()
        launch_both(many)
        assert gpu.launched == KERNELS


@pytest.fixture(params=WARP_SPECIALIZED_TILES, ids=lambda tile: str(tile.block_m))
def always(request: pytest.FixtureRequest) -> Iterator[None]:
    with warp_specialized_wherever_possible(request.param):
        yield


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case, variant, always", each_with_a_tile(EIGHT_BIT_LAYERS, EIGHT_BITS), indirect=["always"]
)
def test_layer(case: str, variant: str, always: None) -> None:
    layer = EIGHT_BIT_LAYERS[case]
    if variant == "block":
        # Tiles of gate and up, each of one block.
        layer = {**layer, "I": -(-layer["I"] // 64) * 64}
    assert_runs_right(make_quantized(EIGHT_BITS[variant], **layer, dtype=torch.bfloat16), GEMM_KERNELS)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "activation, variant, i",
    [
        ("silu", PER_ROW, 336),
        ("silu", INT8, 336),
        ("silu", PER_BLOCK, 320),
        ("swigluoai", per_block(256, 128), 320),
        ("relu2_no_mul", PER_BLOCK, 336),
    ],
    ids=["row", "int8", "block", "tall block", "ungated block"],
)
def test_every_kind_of_tile(activation: str, variant: Variant, i: int, always: None) -> None:
    """Over more steps than the ring has. Up begins within a block of weights."""
    layer = {"K": 1168, "I": i, "activation": activation}
    assert_each_number_of_rows_runs_right(variant, GEMM_KERNELS, **layer)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("rows, i", [(48, 256), (128, 208)])
def test_many_rows_of_other_blocks(rows: int, i: int) -> None:
    """Of fewer rows than a tile has, and gates that end within a tile: by the other kernels."""
    layer = {"M": 700, "K": 512, "I": i, "E": 8, "topk": 2, "biased": True}
    assert_runs_right(
        make_quantized(per_block(rows, 128), **layer, dtype=torch.bfloat16), {"quantized_gather_gemm_kernel"}
    )


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("static", ["", "one", "each"])
def test_scales_of_tensors(static: str, always: None) -> None:
    layer = {"M": 700, "K": 256, "I": 144, "E": 8, "biased": True}
    assert_runs_right(make_quantized(PER_TENSOR, static=static, **layer, dtype=torch.float16), GEMM_KERNELS)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("variant", EIGHT_BITS.values(), ids=EIGHT_BITS)
def test_replays_with_other_routing(variant: Variant, always: None) -> None:
    q = make_quantized(variant, M=1024, K=256, I=128, E=8, dtype=torch.bfloat16)
    assert_right_with_other_routing(q)
