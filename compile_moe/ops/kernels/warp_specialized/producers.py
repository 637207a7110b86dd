"""What producers, the warpgroups that fill the ring, have in common."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from compile_moe.ops.kernels.warp_specialized.compat import copy_box, view


@gluon.jit
def load_weights(w_desc, w_smem, bar, stage, expert, tile_n, k, EPILOGUE: gl.constexpr, STAGES: gl.constexpr):
    """128 weight rows: 64 for each consumer."""
    if w_desc.block_shape[1] == 64:
        # Transposed.
        boxes = view(w_smem, [2 * STAGES] + w_desc.block_shape, w_desc.layout)  # noqa: RUF005
        copy_box(w_desc, [expert, k, tile_n * 128], bar, boxes.index(2 * stage))
        copy_box(w_desc, [expert, k, tile_n * 128 + 64], bar, boxes.index(2 * stage + 1))
    else:
        w = view(w_smem, [STAGES] + w_desc.block_shape, w_desc.layout).index(stage)  # noqa: RUF005
        if EPILOGUE == "gated":
            copy_box(w_desc, [expert, tile_n * 8, 0, 0, k], bar, w)
        else:
            copy_box(w_desc, [expert, tile_n * 128, k], bar, w)


@gluon.jit
def tail_start(rows):
    """Rows before the tail, and whether there is one."""
    before = gl.where(rows > 256, 256, gl.where(rows > 128, 128, 64))
    return before, (rows > 256) | ((rows > 128) & (rows <= 160)) | ((rows > 64) & (rows <= 96))
