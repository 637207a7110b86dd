"""Tiles of the quantized GEMMs: one for each number of rows, within the shared memory of the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from compile_moe.ops.kernels.gemm_problem import has_boxes
from compile_moe.ops.kernels.heuristic_tiles import choose_tile
from compile_moe.ops.kernels.quantized.few_rows import launches as few_rows
from compile_moe.ops.kernels.quantized.operands import steps_of
from compile_moe.ops.kernels.quantized.weight_format import WeightFormat
from compile_moe.ops.kernels.tiles import (
    WARP_SPECIALIZED,
    WARP_SPECIALIZED_64,
    WARP_SPECIALIZED_128,
    DeviceLimits,
    Tile,
    device_limits,
)
from compile_moe.ops.kernels.tuned_tiles import TileChoice
from compile_moe.ops.kernels.warp_specialized import decoding_launches, scale_ring
from compile_moe.ops.kernels.warp_specialized.ring import STEP_BYTES

_ROW_TILES = (16, 32, 64, 128)
#: Rows of an average expert from which the warp-specialized kernels are taken; what each ring took: PERFORMANCE.md,
#: "Many rows on weights that are decoded". Up to 32 rows those of few_rows, where they serve, go before.
DECODING_PAYS_FROM = {WARP_SPECIALIZED_64: 32, WARP_SPECIALIZED_128: 76, WARP_SPECIALIZED: 136}
#: Of float8: both GEMMs with rings of 256, 128 and 64 rows and tiles of 64, us, H200, one run. Qwen3-30B shape, scales
#: of rows, 48, 64, 80, 96, 128 rows an expert: 206, 198, 189, 207; 218, 208, 202, 244; 232, 224, 211, 294; 241, 232,
#: 247, 302; 287, 266, 295, 357. Mixtral, 64, 96, 128 rows, rings only: 414, 398, 396; 442, 425, 537; 463, 453, 594. Of
#: int8, which the same kernels serve, Mixtral, 48, 64, 96, 128, 256 rows: 388, 381, 380, 381; 415, 405, 401, 439; 441,
#: 429, 535, 495; 459, 435, 583, 585; 636, 725, 958, 984.
ROWS_PAY_FROM = {WARP_SPECIALIZED_64: 48, WARP_SPECIALIZED_128: 84, WARP_SPECIALIZED: 148}
#: Of blocks, whose tiles have no tails, in the same order, another run. Qwen3-30B shape, 64, 96, 128, 160, 256 rows an
#: expert: 243, 228, 260, 266; 258, 245, 334, 344; 320, 321, 401, 416; 361, 380, 472, 495; 478, 503, 680, 715. Mixtral,
#: 64, 96, 128, 256 rows: 506, 476, 552, 550; 501, 483, 661, 642; 618, 660, 813, 833; 955, 999, 1367, 1418.
BLOCKS_PAY_FROM = {WARP_SPECIALIZED_128: 56, WARP_SPECIALIZED: 116}


def tile_choice(
    x: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, weight_format: WeightFormat, gated: bool
) -> TileChoice:
    """Tiles for x (rows, depth) and stored weights w (E, rows of weights, ...) into out (S, columns)."""
    limits = device_limits(out.device.index)
    sizes = x.element_size(), w.element_size(), x.size(1), out.size(1)
    for_few_rows = few_rows.serve(weight_format, x, w, w_scale, limits)
    candidates = tile_candidates(*sizes, weight_format, for_few_rows, gated, limits)
    if limits.warp_specialized and can_be_warp_specialized(weight_format, x, w, w_scale, out, gated):
        candidates = (*(tile for tile in candidates if tile.block_m <= 64), *pays_from(weight_format))
    few = None
    if for_few_rows:
        few = few_rows.choose(candidates, out.size(0), w.size(0), out.size(1), w.size(2))
    columns = out.size(1), x.element_size(), 2 if gated else 1
    tile = few or choose_tile(candidates, out.size(0), w.size(0), *columns, pays_from(weight_format), limits)
    return TileChoice(tile, candidates)


def pays_from(weight_format: WeightFormat) -> Mapping[Tile, int]:
    """Rows of an average expert from which the warp-specialized tiles are taken."""
    if not weight_format.scales_sums:
        return DECODING_PAYS_FROM
    return BLOCKS_PAY_FROM if weight_format.group else ROWS_PAY_FROM


def can_be_warp_specialized(
    weight_format: WeightFormat, x: Tensor, w: Tensor, w_scale: Tensor, out: Tensor, gated: bool
) -> bool:
    """Whether warp-specialized kernels, on a device that runs them, compute this."""
    if weight_format.scales_sums:
        # A tile has 64 rows of gate and of up, each of one block.
        in_blocks = not (gated and weight_format.group) or out.size(1) % (scale_ring.TILE_ROWS // 2) == 0
        return may_be_warp_specialized(weight_format, w) and has_boxes(x, w, out) and in_blocks
    return decoding_launches.serve(weight_format, x, w, w_scale, out)


def may_be_warp_specialized(weight_format: WeightFormat, w: Tensor) -> bool:
    """Whether there are warp-specialized kernels of a scheme: 8 bits with scales of whole rows; in floating point also
    of blocks, of a step's columns and as many rows as tiles have, or multiples; or weights that are decoded, as far as
    the scheme goes.
    """
    if weight_format.decode_pairs is not None:
        return True
    is_step = not weight_format.group or (
        weight_format.group == STEP_BYTES.value and weight_format.rows % scale_ring.TILE_ROWS == 0
    )
    has_kernels = w.dtype is torch.float8_e4m3fn or (w.dtype is torch.int8 and not weight_format.group)
    return weight_format.scales_sums and is_step and has_kernels


def special_from(weight_format: WeightFormat, w: Tensor) -> int | None:
    """Rows of an average expert from which warp-specialized kernels may be taken; None: never."""
    return min(pays_from(weight_format).values()) if may_be_warp_specialized(weight_format, w) else None


def block_rows(weight_format: WeightFormat) -> int:
    """As the warp-specialized kernels take them: rows of a block of the weights, 0 where whole rows have a scale."""
    return weight_format.rows if weight_format.group else 0


@functools.cache
def tile_candidates(
    x_size: int,
    w_size: int,
    depth: int,
    num_columns: int,
    weight_format: WeightFormat,
    for_few_rows: bool,
    gated: bool,
    limits: DeviceLimits,
) -> tuple[Tile, ...]:
    """One tile for each of ``_ROW_TILES``, two of few rows of 8 bits, or some of ``few_rows`` and one for each larger
    one; ``block_n`` counts columns of the result, of which gate and up make one.

    Args:
        x_size, w_size: bytes of a token's and of a stored weight's element.
        for_few_rows: whether the kernels of ``few_rows`` serve.
    """
    tiles: list[Tile] = []
    if for_few_rows:
        tiles = [*few_rows.candidates(num_columns, depth // weight_format.packed, gated)]
    for block_m in _ROW_TILES:
        if for_few_rows and block_m <= few_rows.MOST_ROWS:
            continue
        if x_size == 4:
            # IEEE float32 runs on the ordinary units: what bounds it is registers.
            tile = Tile(min(block_m, 64), 64, 32, 2, 4 if block_m <= 32 else 8)
        elif block_m <= 32:
            tile = Tile(block_m, 64, 128, 4, 4)
        elif block_m == 64 or (weight_format.scales_sums and weight_format.group):
            # Sums of a group beside those of all groups, and the tokens' scales, fill the registers early. On Hopper 4
            # warps are enough: both GEMMs together took 0.77 to 0.99 of what they took with 8 (H200, float8, 32 to 128
            # rows an average expert).
            step, warps = (128, 4 if limits.warp_specialized else 8) if x_size == 1 else (64, 8)
            tile = Tile(64, 128, step, 4, warps)
        elif weight_format.scales_sums or limits.async_mma:
            tile = Tile(block_m, 128, 128 if x_size == 1 else 64, 3, 8)
        else:
            # Tensor cores that take both operands from registers, one of them just dequantized.
            tile = Tile(block_m, 128, 32, 4, 8)
        if weight_format.packed > 1 and tile.block_k == 128 and depth % 128 == 64:
            # Without a mask, with which packed weights would be loaded byte by byte.
            tile = tile._replace(block_k=64, num_stages=2 * tile.num_stages)
        tile = tile._replace(block_k=steps_of(tile.block_k, weight_format)[0])
        width = tile.block_n // 2 if gated else tile.block_n
        # Narrow matrices: no tile wider than the next power of two of the columns.
        width = max(16, min(width, triton.next_power_of_2(num_columns)))
        # The deeper one where all programs run at once: a layer of the Qwen3-30B shape in FP8 with 4 and 3 stages of
        # GEMM 1, 4 and 256 tokens, 48.8 and 180.2 -> 46.4 and 176.6 us; of Mixtral with 3, 4 and 5 stages of GEMM 2, 2
        # tokens, 175.7, 167.5, 164.2 (H200).
        for num_stages in (5, 3) if x_size == 1 and block_m <= 32 else (tile.num_stages,):
            each = tile._replace(num_stages=num_stages)
            while (
                shared_memory(each, x_size, w_size, weight_format) > limits.shared_memory
                and each.num_stages > 2
            ):
                each = each._replace(num_stages=each.num_stages - 1)
            tiles.append(each._replace(block_n=width))
    return tuple(dict.fromkeys(tiles))


def shared_memory(tile: Tile, x_size: int, w_size: int, weight_format: WeightFormat) -> int:
    """Of a tile whose ``block_n`` counts rows of weights: loads under way, and tokens that pass through registers."""
    x, w = tile.block_m * x_size, tile.block_n * w_size // weight_format.packed
    split = x if weight_format.packed > 1 else 0
    return tile.block_k * (tile.num_stages * (x + w) + split)
