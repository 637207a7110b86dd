"""Quantized weights with few rows an expert: when their kernels are chosen, and results on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops.kernels import launch
from compile_moe.ops.kernels.quantized.few_rows.launches import FewRowsTile, serve
from compile_moe.ops.kernels.quantized.tiles import tile_choice
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile
from compile_moe.ops.kernels.tuned_tiles import TileChoice
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import SCHEMES, QuantizedWeights
from tests.support.quantized import Variant, make_quantized
from tests.support.quantized_gemms import GEMMS, Gemms, spread
from tests.support.quantized_inputs import op

LIMITS = DeviceLimits(227 * 1024, async_mma=True)
#: Every scheme that has them, with its sizes by default, and others.
VARIANTS = {name: Variant(name) for name in sorted(SCHEMES) if SCHEMES[name].decode_words is not None} | {
    "int4, zero points": Variant("int4_w4a16", (("group_size", 32),), zero_points=True),
    "int4, wide groups": Variant("int4_w4a16", (("group_size", 512),)),
    "int8, zero points": Variant("int8_w8a16", (("group_size", 64),), zero_points=True),
}


def served(
    variant: Variant,
    k: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype | None = None,
    limits: DeviceLimits = LIMITS,
    **changed: Tensor,
) -> bool:
    scheme = variant.made
    tensors = {
        "x": torch.empty(4, k, dtype=dtype),
        "w": torch.empty(*scheme.weight_shape(2, 64, k), dtype=scheme.weight_dtype),
        "w_scale": torch.empty(
            *scheme.scale_shape(2, 64, k), dtype=scheme.scale_dtype or scale_dtype or dtype
        ),
    }
    return serve(weight_format(scheme.text), **(tensors | changed), limits=limits)


def test_where_they_serve() -> None:
    assert all(served(variant, 512) for variant in VARIANTS.values())
    int4, mxfp4, int8 = (VARIANTS[name] for name in ("int4_w4a16", "mxfp4_w4a16", "int8_w8a16"))
    assert served(int4, dtype=torch.float16) and served(int8, dtype=torch.float16)
    # Decoded in float32: 2^-127 is no float16, and scales of float32 are multiplied in float32.
    assert not served(mxfp4, dtype=torch.float16) and not served(int4, dtype=torch.float32)
    assert not served(int4, scale_dtype=torch.float32) and served(int8, scale_dtype=torch.float32)
    # Groups that a thread's columns would cross, or whose scales don't fit.
    assert not served(Variant("int4_w4a16", (("group_size", 16),)))
    assert not served(Variant("int4_w4a16", (("group_size", 96),)), 96 * 4)
    assert not served(Variant("int4_w4a16", (("group_size", 1024),)), 1024)
    # 16 bytes at once.
    assert served(int8, 272) and not served(int8, 264)
    wide = torch.empty(4, 512, dtype=torch.bfloat16)
    assert served(int8, x=wide[:, :256]) and not served(int8, x=wide[:, 1:257])
    assert not served(int8, x=wide[:, ::2])
    assert not served(int8, w=torch.empty(2, 256, 64, dtype=torch.uint8).transpose(1, 2))
    assert not served(int8, limits=DeviceLimits(64 * 1024, async_mma=False))
    # Distances of 31 bits within an expert's weights.
    tall = torch.empty(1, 2**23, 256, dtype=torch.uint8, device="meta")
    assert not served(int8, w=tall) and served(int8, w=tall[:, :-1])
    # What these kernels know nothing of.
    form = weight_format(int8.made.text)
    x, w, scale = torch.empty(4, 256, dtype=torch.bfloat16), torch.empty(2, 64, 256), torch.empty(2, 64)
    assert serve(form, x, w.byte(), scale, LIMITS) and not serve(form, x, w.char(), scale, LIMITS)
    assert not serve(form._replace(rows=16), x, w.byte(), scale, LIMITS)
    assert not serve(form, x, w.byte(), scale.byte(), LIMITS)


def tile_choice_of(num_slots: int, num_experts: int, columns: int, depth: int, gated: bool) -> TileChoice:
    x = torch.empty(max(num_slots, 1), depth, dtype=torch.bfloat16)
    w = torch.empty(num_experts, 1, depth // 2, dtype=torch.uint8)
    scale = torch.empty(num_experts, 1, depth // 128, dtype=torch.bfloat16)
    out = torch.empty(num_slots, columns, dtype=torch.bfloat16)
    return tile_choice(x, w, scale, out, weight_format(VARIANTS["int4_w4a16"].made.text), gated)


def chosen(
    num_slots: int, num_experts: int = 128, columns: int = 768, depth: int = 4096, gated: bool = True
) -> Tile:
    return tile_choice_of(num_slots, num_experts, columns, depth, gated).tile


def test_the_tile_follows_the_rows_of_an_average_expert() -> None:
    assert [chosen(slots).block_m for slots in (0, 128, 640, 641, 1536, 1537, 4096, 4097)] == [
        *(8, 8, 8, 16, 16, 32, 32, 64)
    ]
    narrow, tile = chosen(8), chosen(256)
    assert narrow.block_n == 32 and narrow.num_warps == 2 and tile.block_n == 64 and tile.num_warps == 4
    assert isinstance(narrow, FewRowsTile) and not isinstance(chosen(4097), FewRowsTile)
    # Enough programs with wide tiles, or too little for each to load.
    assert chosen(8, columns=4096).block_n == chosen(8, depth=2048).block_n == 64


@pytest.mark.parametrize("slots, rows", [(8, 8), (32, 8), (64, 16), (128, 32)])
def test_few_programs_with_more_to_load_are_narrow(slots: int, rows: int) -> None:
    """Those of Mixtral's second GEMM on weights of 8 bits: as many bytes a row."""
    second = {"num_experts": 8, "columns": 4096, "depth": 28672, "gated": False}
    tile = chosen(slots, **second)
    assert isinstance(tile, FewRowsTile) and (tile.block_m, tile.block_n, tile.num_warps) == (rows, 64, 2)
    for change in ({"columns": 8192}, {"depth": 14336}):
        assert chosen(slots, **{**second, **change}).block_n == 128


@pytest.mark.parametrize(
    "columns, depth, gated", [(768, 4096, True), (4096, 28672, False), (2048, 768, False)]
)
def test_no_number_of_tokens_takes_a_tile_that_was_not_loaded(columns: int, depth: int, gated: bool) -> None:
    choices = [
        tile_choice_of(slots, experts, columns, depth, gated)
        for experts in (1, 2, 8, 128)
        for slots in (0, 1, 2, 7, 8, 9, 30, 64, 100, 128, 500, 1536, 4096, 5000)
    ]
    assert {choice.candidates for choice in choices} == {choices[0].candidates}
    assert all(choice.tile in choice.candidates for choice in choices)


def with_rows(rows: list[int], variant: Variant, **layer: Any) -> Gemms:
    """Of experts with so many rows each."""
    ids = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))[torch.randperm(sum(rows))]
    made = make_quantized(variant, M=sum(rows) // 2, E=len(rows), topk=2, dtype=torch.bfloat16, **layer)
    made.layer.topk_ids.copy_(ids.view(-1, 2))
    return Gemms(made)


#: Tiles of 16 and of 32 with as many rows as half of them or all, one more, or few.
ROWS = {16: [8, 9, 17, 2], 32: [16, 17, 40, 3]}


def run(stage: str, arguments: Any) -> tuple[Tensor, dict[str, int]]:
    """The result, and warps of the kernels that made it."""
    record: list[Any] = []
    on_gpu = [a.cuda() if isinstance(a, Tensor) and not a.is_cuda else a for a in arguments]
    with launch.recording(lambda ready, _: record.extend(ready)):
        result = op(stage)(*on_gpu)
    return result, {each.compiled.name: each.compiled.metadata.num_warps for each in record}


def name(stage: str) -> str:
    return f"{stage.replace('quantized', 'few_rows')}_kernel"


def assert_right(gemms: Gemms) -> list[int]:
    """Both GEMMs, by these kernels: with how many warps."""
    warps = []
    for stage in GEMMS:
        result, kernels = run(stage, gemms.inputs[stage])
        assert list(kernels) == [name(stage)]
        warps.append(kernels[name(stage)])
        gemms.check(stage, result.cpu())
    return warps


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "swigluoai", "relu2_no_mul"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gemms(variant: str, activation: str) -> None:
    """Every tile but those of the next test; depths that end in a step, or are less than one; columns in a tile."""
    # Experts' rows on average: 1, with narrow tiles in GEMM 1 and in GEMM 2, 4, 10, 30, and 1 of many experts.
    sizes = (
        *((1, 2592, 272, 8), (2, 96, 2624, 8)),
        *((15, 544, 96, 8), (40, 96, 1312, 8), (120, 1024, 288, 8), (60, 96, 96, 128)),
    )
    for m, k, i, e in sizes:
        made = make_quantized(
            VARIANTS[variant], M=m, K=k, I=i, E=e, topk=2, biased=True, dtype=torch.bfloat16, activation=activation,
            skipped=m == 40, routing="empty" if m == 15 else "random",
        )  # fmt: skip
        assert_right(Gemms(made))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_narrow_tiles_for_more_rows(variant: str) -> None:
    """Of 8, 16 and 32, with the longest depths: in GEMM 1 or in GEMM 2."""
    for m, k, i, warps in ((4, 32, 16672, [4, 2]), (10, 16672, 32, [2, 4]), (30, 32, 16672, [4, 2])):
        made = make_quantized(
            VARIANTS[variant], M=m, K=k, I=i, E=2, topk=2, biased=True, dtype=torch.bfloat16
        )
        assert assert_right(Gemms(made)) == warps


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ROWS.values(), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_that_are_half_full_or_less(variant: str, rows: list[int]) -> None:
    """Both GEMMs with wide tiles, then each with narrow ones."""
    for k, i, warps in ((512, 544, [4, 4]), (16672, 32, [2, 4]), (32, 16672, [4, 2])):
        assert assert_right(with_rows(rows, VARIANTS[variant], K=k, I=i, biased=True)) == warps


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [name for name in VARIANTS if not VARIANTS[name].made.powers_of_two])
def test_float16(variant: str) -> None:
    for m in (3, 40):
        assert_right(
            Gemms(make_quantized(VARIANTS[variant], M=m, K=512, I=544, E=8, biased=True, dtype=torch.float16))
        )


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_on_one_expert(variant: str) -> None:
    layer: dict[str, Any] = {"M": 50, "K": 512, "I": 512, "E": 8, "routing": "one"}
    assert_right(Gemms(make_quantized(VARIANTS[variant], **layer, dtype=torch.bfloat16)))


def assert_every_number(variant: Variant, tokens: int, dtype: torch.dtype, kernel: str) -> None:
    """Tokens with a single 1 bring out what each weight is multiplied by: it, rounded once."""
    scheme = variant.made
    if scheme.powers_of_two and dtype is torch.float16:
        pytest.skip("bfloat16 only, which has the range of the scales")
    e, n, k = 2, 128, 512
    shape, zeros = scheme.scale_shape(e, n, k), scheme.zero_point_shape(e, n, k)
    weight = torch.randint(0, 256, scheme.weight_shape(e, n, k), dtype=torch.uint8)
    if scheme.scale_dtype is torch.uint8:
        # From the smallest to the largest of which 6 times is no infinity.
        scale = torch.randint(0, 253, shape, dtype=torch.uint8)
        scale.view(-1)[:4] = torch.tensor([0, 1, 129, 252])
    else:
        scale = torch.randn(shape).mul(2.0 ** torch.randint(-12, 3, shape)).to(dtype)
    zero_point = None
    if variant.zero_points:
        assert zeros is not None
        zero_point = torch.randint(0, 256, zeros, dtype=torch.uint8)
    stored = QuantizedWeights(weight, scale, zero_point)
    exact = scheme.dequantize(*stored, torch.float64)
    if scheme.scale_block[1] is not None:
        exact = exact.to(dtype).double()
    columns = torch.randperm(k)[:tokens]
    x = torch.zeros(tokens, k, dtype=dtype)
    x[torch.arange(tokens), columns] = 1
    slots, half = torch.arange(tokens, dtype=torch.int32), tokens // 2
    offsets = torch.tensor([0, half, tokens], dtype=torch.int32)
    result, kernels = run(
        GEMMS[0], (x, None, weight, scale, zero_point, slots, offsets, 1, scheme.text, dtype, None, "")
    )
    assert kernel in kernels
    expected = torch.cat([exact[0][:, columns[:half]].t(), exact[1][:, columns[half:]].t()])
    assert torch.equal(result.cpu(), expected.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [8, 48])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_number(variant: str, tokens: int, dtype: torch.dtype) -> None:
    assert_every_number(VARIANTS[variant], tokens, dtype, name(GEMMS[0]))


@pytest.mark.gpu
def test_a_scale_that_is_no_number() -> None:
    scheme = SCHEMES["mxfp4_w4a16"]()
    weight = torch.full((1, 64, 128), 0x22, dtype=torch.uint8)
    scale = torch.full((1, 64, 8), 127, dtype=torch.uint8)
    scale[0, 5, 3] = 255
    x, slots = torch.ones(3, 256, dtype=torch.bfloat16), torch.arange(3, dtype=torch.int32)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    arguments = (x, None, weight, scale, None, slots, offsets, 1, scheme.text, torch.bfloat16, None, "")
    result = run(GEMMS[0], arguments)[0].cpu()
    assert result[:, 5].isnan().all() and result.isnan().sum() == 3
    assert (result[:, :5] == 256).all()


@pytest.mark.gpu
def test_other_operands_take_other_kernels() -> None:
    gemms = Gemms(make_quantized(VARIANTS["int8_w8a16"], M=9, K=256, I=256, E=8, dtype=torch.bfloat16))
    x, *rest = gemms.inputs[GEMMS[0]]
    for other in (spread(x), torch.cat([x, x], 1)[:, 1:257]):
        # With its strides, and its distance from 16 bytes.
        storage = torch.empty(other.untyped_storage().nbytes() // 2, dtype=x.dtype, device="cuda")
        moved = storage.as_strided(other.shape, other.stride(), other.storage_offset()).copy_(other)
        assert run(GEMMS[0], (moved, *rest))[1].keys() == {"quantized_gather_gemm_kernel"}
