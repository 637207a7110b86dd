"""The kernels of quantized GEMMs compile for every architecture, in its registers and shared memory."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.quantized import gather_gemm, scatter_gemm
from compile_moe.ops.kernels.quantized.few_rows import launches as few_rows
from compile_moe.ops.kernels.quantized.tiles import tile_candidates
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.quantized_format import weight_format
from compile_moe.quantization import Scheme
from tests.support.aot import SHARED_MEMORY_BUDGET, CompiledKernel, compile_ahead
from tests.support.quantized import Variant
from tests.support.quantized_gemms import DEFAULTS

#: Those with one scale have the code of those with scales of rows.
OTHER_CODE = [variant for variant in DEFAULTS if not variant.startswith("fp8_w8a8_tensor")]

QWEN3_30B = (128, 8, 2048, 768)
ODD = (7, 2, 75, 51)
OWN_TILES = few_rows.WIDE + few_rows.NARROW
#: Of 16 rows, which have just enough registers for four programs; of 32, with the most registers; and the narrow one
#: with the most shared memory. Enough where all would take minutes.
TIGHTEST = (*few_rows.WIDE[1:], few_rows.NARROW[-1])
#: Bytes of a thread of these kernels that the assembler may trade for occupancy: 16 registers of 128.
MOST_SPILLED = 64


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def operands(variant: Variant, rows: int, e: int, n: int, k: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Tokens, their scales, weights, their scales and zero points."""
    scheme: Scheme = variant.made
    scaling = scheme.token_scaling
    zeros = scheme.zero_point_shape(e, n, k)
    return (
        empty(rows, k, dtype=scaling.dtype if scaling else dtype),
        empty(*scaling.scale_shape(rows, k), dtype=torch.float32) if scaling else None,
        empty(*scheme.weight_shape(e, n, k), dtype=scheme.weight_dtype),
        empty(*scheme.scale_shape(e, n, k), dtype=scheme.scale_dtype or dtype),
        empty(*zeros, dtype=torch.uint8) if variant.zero_points and zeros is not None else None,
    )


def compiled(
    variant: Variant,
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...] = QWEN3_30B,
    act: str = "silu",
    which: str = "some",
) -> list[tuple[Tile, CompiledKernel]]:
    """Both kernels, biased: with "all" of their tiles, some ("few rows" only, or these and the others), those of the
    "others" only, or the others' "ends".
    """
    e, topk, k, i = shape
    multiple = variant.made.column_multiple
    k, i = -(-k // multiple) * multiple, -(-i // multiple) * multiple
    limits = DeviceLimits(SHARED_MEMORY_BUDGET[capability], capability in (90, 100), capability == 90)
    form, program = weight_format(variant.made.text), parse(program_text(act))
    precision = "ieee" if dtype is torch.float32 else "16-bit"
    n, s = 2 * i if program.gated else i, 64 * topk
    slots, offsets = empty(s), empty(e + 1)

    def candidates(given: tuple[Any, ...], columns: int, gated: bool) -> tuple[Tile, ...]:
        x, _, w, w_scale, _ = given
        sizes = x.element_size(), w.element_size(), x.size(1), columns
        for_few_rows = which in ("all", "some", "few rows") and few_rows.serve(form, x, w, w_scale, limits)
        tiles = tile_candidates(*sizes, form, for_few_rows, gated, limits)
        own = few_rows.candidates(columns, 2**16, gated) if for_few_rows else ()
        if own and which != "all":
            own = tuple(each for each, tile in zip(own, OWN_TILES, strict=True) if tile in TIGHTEST)
        if which == "few rows":
            return own
        others = (tile for tile in tiles if not isinstance(tile, few_rows.FewRowsTile))
        return (tiles[0], tiles[-1]) if which == "ends" else (*own, *others)

    launches: list[tuple[Tile, Launch]] = []
    first, second = operands(variant, 64, e, n, k, dtype), operands(variant, s, e, k, i, dtype)
    for tile in candidates(first, i, program.gated):
        out, bias = empty(s, i, dtype=dtype), empty(e, n, dtype=dtype)
        body = program.triton_source()
        launch = gather_gemm.launch_for(
            tile, out, *first, slots, offsets, topk, form, bias, body, program.layout, False, precision
        )
        launches.append((tile, launch))
    for tile in candidates(second, k, False):
        out, bias = empty(s, k, dtype=dtype), empty(e, k, dtype=dtype)
        launch = scatter_gemm.launch_for(tile, out, *second, slots, offsets, form, bias, False, precision)
        launches.append((tile, launch))
    results = []
    for tile, launch in launches:
        options = dict(launch.options)
        compiler = {
            name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options
        }
        options["EARLY"] = capability >= 90
        result = compile_ahead(launch.kernel, launch.args, options, capability=capability, **compiler)
        assert result.fits, f"{tile}: {result.shared} bytes of shared memory"
        assert not result.may_overwrite_operands, f"{tile}"
        results.append((tile, result))
    return results


def assert_no_spills(results: list[tuple[Tile, CompiledKernel]], allowed: int = 0) -> None:
    """More than ``allowed`` bytes, or MOST_SPILLED of those for few rows."""
    for tile, result in results:
        spilled = max(result.spill_stores, result.spill_loads)
        most = MOST_SPILLED if isinstance(tile, few_rows.FewRowsTile) else allowed
        assert spilled <= most, f"{tile}: {result.registers} registers, {spilled} bytes spilled"


def assert_copies_16_bytes(result: CompiledKernel) -> None:
    """All of its asynchronous copies, of which there are some."""
    copies = re.findall(r"cp\.async\.\w+\.shared\.global\D*\S+ \+ 0 \], \[ \S+ \+ 0 \], (\w+)", result.ptx)
    assert copies and set(copies) == {"0x10"}


@pytest.mark.parametrize("variant", OTHER_CODE)
def test_on_hopper(variant: str) -> None:
    results = compiled(DEFAULTS[variant], 90, torch.bfloat16, which="all")
    assert_no_spills(results)
    own = [result for tile, result in results if isinstance(tile, few_rows.FewRowsTile)]
    others = [result for tile, result in results if not isinstance(tile, few_rows.FewRowsTile)]
    assert len(own) == (2 * len(OWN_TILES) if DEFAULTS[variant].made.decode_words else 0)
    for result in own:
        assert_copies_16_bytes(result)
    assert all(result.has_wgmma for result in others)


# Compiling every variant for each would take minutes.
@pytest.mark.parametrize(
    ("variant", "capability"),
    [("int4_w4a16-default", 80), ("fp8_w8a8_block-default", 100), ("mxfp4_w4a16-default", 120)],
)
def test_elsewhere(variant: str, capability: int) -> None:
    made = DEFAULTS[variant]
    # The assembler trades a few bytes for occupancy.
    assert_no_spills(compiled(made, capability, torch.bfloat16), 32)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        ("int4_w4a16-default", torch.float32),
        ("int4_w4a16-default", torch.float16),
        ("int8_w8a16-default", torch.float16),
        ("mxfp4_w4a16-default", torch.float32),
        ("mxfp4_w4a16-default", torch.float16),
    ],
    ids=str,
)
def test_other_dtypes(variant: str, dtype: torch.dtype) -> None:
    assert_no_spills(compiled(DEFAULTS[variant], 90, dtype), 16)


def test_groups_of_8_bits() -> None:
    variant = Variant("int8_w8a16", (("group_size", 64),), zero_points=True)
    assert_no_spills(compiled(variant, 90, torch.bfloat16, which="others"), 16)


@pytest.mark.parametrize(
    ("variant", "shape", "activation", "dtype"),
    [
        (Variant("int4_w4a16", (("group_size", 512),)), QWEN3_30B, "relu2_no_mul", torch.float16),
        (DEFAULTS["mxfp4_w4a16-default"], (128, 4, 2880, 1440), "swigluoai", torch.bfloat16),
    ],
    ids=["wide groups", "masked"],
)
def test_few_rows(variant: Variant, shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    results = compiled(variant, 90, dtype, shape, activation, "few rows")
    assert len(results) == 2 * len(TIGHTEST)
    assert_no_spills(results)
    for _, result in results:
        assert_copies_16_bytes(result)


@pytest.mark.parametrize(
    ("variant", "activation"), zip(OTHER_CODE, itertools.cycle(["swigluoai", "relu2_no_mul"]))
)
def test_odd_sizes(variant: str, activation: str) -> None:
    compiled(DEFAULTS[variant], 90, torch.bfloat16, ODD, activation, "ends")
