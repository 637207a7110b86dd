"""What producers, the warpgroups that fill the ring, have in common."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.compat import copy_box, view


@gluon.jit
def load_weights(w_desc, w_smem, bar, stage, expert, tile_n, k, EPILOGUE: gl.constexpr, STAGES: gl.constexpr):
    """Weight rows of a stage, side by side: 64 or 128 for each consumer."""
    BOXES: gl.constexpr = w_smem.shape[0] // STAGES  # of 64 rows
    if w_desc.block_shape[1] == 64:
        # Transposed.
        boxes = view(w_smem, [BOXES * STAGES] + w_desc.block_shape, w_desc.layout)  # noqa: RUF005
        for i in gl.static_range(BOXES):
            copy_box(w_desc, [expert, k, (tile_n * BOXES + i) * 64], bar, boxes.index(BOXES * stage + i))
    else:
        PAIRS: gl.constexpr = BOXES // 2
        pairs = view(w_smem, [PAIRS * STAGES] + w_desc.block_shape, w_desc.layout)  # noqa: RUF005
        for i in gl.static_range(PAIRS):
            pair = tile_n * PAIRS + i
            if EPILOGUE == "gated":
                copy_box(w_desc, [expert, pair * 8, 0, 0, k], bar, pairs.index(PAIRS * stage + i))
            else:
                copy_box(w_desc, [expert, pair * 128, k], bar, pairs.index(PAIRS * stage + i))


@gluon.jit
def tail_start(rows):
    """Rows before the tail, and whether there is one."""
    before = gl.where(rows > 256, 256, gl.where(rows > 128, 128, 64))
    return before, (rows > 256) | ((rows > 128) & (rows <= 160)) | ((rows > 64) & (rows <= 96))
