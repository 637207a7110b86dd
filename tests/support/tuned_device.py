"""A folder of tuned tiles for a device that this machine need not have: where kernels are interpreted or simulated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from compile_moe.ops import tuning
from compile_moe.ops.kernels import tile_file, tuned_tiles

NAME = "Some GPU 80GB"


@contextlib.contextmanager
def tuned_device(folder: Path | str) -> Iterator[None]:
    """Tensors on the CPU count as those of a device called NAME; nothing is known of files read before."""
    with (
        mock.patch.dict(os.environ, {tile_file.VARIABLE: str(folder)}),
        mock.patch.object(tuned_tiles, "device_name", lambda index: NAME),
        mock.patch.object(tuning, "device_name", lambda index: NAME),
    ):
        tuned_tiles._read.cache_clear()
        tuned_tiles._reported.clear()
        try:
            yield
        finally:
            tuned_tiles._read.cache_clear()
