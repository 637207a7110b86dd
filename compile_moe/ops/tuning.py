"""The two GEMMs with any tile, and the files that keep the best ones: what ``compile-moe tune`` works with.

Nothing here is used by the ops, and nothing here takes times.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels import gather_gemm, scatter_gemm
from compile_moe.ops.kernels.gemm_problem import GemmProblem, Shape
from compile_moe.ops.kernels.launch import Launch
from compile_moe.ops.kernels.precision import dot_precision
from compile_moe.ops.kernels.tile_file import (
    as_text,
    file_name,
    merged,
    record,
    tiles_folder,
)
from compile_moe.ops.kernels.tile_file import (
    parse as parse_file,
)
from compile_moe.ops.kernels.tile_space import tile_space
from compile_moe.ops.kernels.tiles import Tile, device_limits
from compile_moe.ops.kernels.tuned_tiles import TunedTilesWarning, device_name, heuristic_choice

__all__ = [
    "Gemm",
    "GemmProblem",
    "Shape",
    "Tile",
    "device_name",
    "file_name",
    "gather",
    "record",
    "scatter",
    "store",
    "tiles_folder",
]


@dataclass(frozen=True)
class Gemm:
    """One of the two GEMMs on given operands, to be run with any tile."""

    problem: GemmProblem
    out: Tensor  # (S, columns)
    launches_with: Callable[[Tile], tuple[Launch, ...]]

    @property
    def num_slots(self) -> int:
        return self.out.size(0)

    @property
    def heuristic_tile(self) -> Tile:
        return heuristic_choice(self.problem, self.num_slots, self.out.device.index).tile

    def tiles(self) -> tuple[Tile, ...]:
        """All that are worth measuring."""
        return tile_space(self.problem, self.num_slots, device_limits(self.out.device.index))

    def compile(self, tile: Tile) -> None:
        """Compile without loading; several threads may."""
        with torch.cuda.device(self.out.device) if self.out.is_cuda else contextlib.nullcontext():
            for launch in self.launches_with(tile):
                launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)

    def run(self, tile: Tile) -> None:
        for launch in self.launches_with(tile):
            launch.kernel[launch.grid](*launch.args, **launch.options)


def gather(
    out: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    routing: tuple[Tensor, Tensor],
    topk: int,
    bias: Tensor | None,
    epilogue: str,
) -> Gemm:
    """GEMM 1 into out (S, I); routing: sorted_slots and expert_offsets; epilogue: program text."""
    program = parse(epilogue)
    arguments = (
        out,
        hidden_states,
        w1,
        *routing,
        topk,
        bias,
        program.triton_source(),
        program.layout,
        False,
        dot_precision(out.dtype),
        None,
    )
    return _gemm(gather_gemm, arguments)


def scatter(
    out: Tensor, intermediate: Tensor, w2: Tensor, routing: tuple[Tensor, Tensor], bias: Tensor | None
) -> Gemm:
    """GEMM 2 into out (S, K)."""
    return _gemm(scatter_gemm, (out, intermediate, w2, *routing, bias, False, dot_precision(out.dtype), None))


def _gemm(kernels: Any, arguments: tuple[Any, ...]) -> Gemm:
    return Gemm(
        kernels.problem_of(*arguments), arguments[0], lambda tile: kernels.launches_for(tile, *arguments)
    )


def store(
    folder: Path, device: torch.device, shape: Shape, best: Mapping[GemmProblem, Mapping[int, Tile]]
) -> Path:
    """Add the best tiles, by number of slots, to the file for a device and a shape; return its path.

    Other processes may do the same at the same time: what they add stays. A damaged file is replaced.

    Raises:
        OSError: the folder or the file can't be written.
    """
    name, limits = device_name(device.index), device_limits(device.index)
    if name is None:
        raise ValueError(f"tiles are stored for a CUDA device with its index, got {device}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(name, shape)
    with FileLock(path.with_suffix(".lock")):
        try:
            old = parse_file(path.read_text(encoding="utf-8"), name, shape, limits)
        except FileNotFoundError:
            old = {}
        except ValueError as error:
            warnings.warn(
                f"compile_moe: {path} is damaged, and is replaced: {error}", TunedTilesWarning, stacklevel=2
            )
            old = {}
        _replace(path, as_text(name, merged(old, best)))
    return path


def _replace(path: Path, text: str) -> None:
    """Readers see the old file or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
