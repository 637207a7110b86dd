"""Run Triton kernels on CPU tensors: repairs of Triton's interpreter, and processes to run it in.

As shipped (triton 3.6 to 3.9) the interpreter computes in the integers that store bfloat16, truncates casts, knows no
libdevice, and reads out of bounds silently. ``repair()`` mends that. The switch TRITON_INTERPRET is read when a
kernel is decorated, so interpreted tests live in ``tests/interpreted`` and run in processes of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.interpreter_bounds import check_bounds
from tests.support.interpreter_floats import repair_floats
from tests.support.interpreter_libdevice import add_libdevice

ROOT = Path(__file__).resolve().parents[2]


def is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(*test_files: Path, timeout: float = 600) -> None:
    """Run test files in one process under the interpreter, and fail with its output if it fails."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, test_files)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if result.returncode != 0:
        names = ", ".join(file.name for file in test_files)
        raise AssertionError(f"{names} under the interpreter:\n{result.stdout}\n{result.stderr}")


@functools.cache
def repair() -> None:
    """Mend the interpreter of this process. Call it before the first launch."""
    if not is_interpreting():
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported; see run_interpreted")
    import triton.runtime.interpreter as shipped

    _patch_once(shipped)
    # It would compute conditions that nothing looks at, as assertions on the device are off.
    builder = shipped.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    repair_floats(shipped)
    _repair_scalars(shipped)
    _check_unrolled_loops(shipped)
    _sort_at_once(shipped)
    check_bounds(shipped)
    add_libdevice(shipped)


def _patch_once(shipped: Any) -> None:
    """Each call of a device function patches triton.language anew, which takes long: let launches do it."""
    import triton.language as tl

    shipped_patch = shipped._patch_lang
    under_way: list[Any] = []

    def patch_lang(function: Any) -> Any:
        if under_way:
            return SimpleNamespace(restore=lambda: None)
        # What any function may see.
        scope = shipped_patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        under_way.append(scope)
        return SimpleNamespace(restore=lambda: under_way.pop().restore())

    shipped._patch_lang = patch_lang


def _repair_scalars(shipped: Any) -> None:
    """Scalars are arrays of one element to the interpreter, which numpy no longer turns into an index; and truth
    values carry the dtype of what was compared, which triton 3.9 makes theirs when it spreads a scalar over a block.
    """
    shipped_patch = shipped._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        shipped_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    shipped._patch_lang_tensor = patch_tensor
    shipped_splat = shipped.InterpreterBuilder.create_splat

    def create_splat(self: Any, block_type: Any, scalar: Any) -> Any:
        block = shipped_splat(self, block_type, scalar)
        block.data = block.data.astype(scalar.data.dtype)
        return block

    shipped.InterpreterBuilder.create_splat = create_splat


def _check_unrolled_loops(shipped: Any) -> None:
    """Refuse what a loop that is unrolled gets wrong: MLIR divides what lies between its bounds without a sign."""
    shipped_patch = shipped._patch_lang_core

    def patch_core(lang: Any, scope: Any) -> None:
        shipped_patch(lang, scope)
        shipped_range = lang.range

        def checked_range(*bounds: Any, loop_unroll_factor: int = 1, **options: Any) -> range:
            loop: range = shipped_range(*bounds, **options)
            backwards = loop.stop - loop.start + loop.step - 1 < 0
            assert loop_unroll_factor == 1 or not backwards, f"{loop} can't be unrolled"
            return loop

        scope.set_attr(lang, "range", checked_range)

    shipped._patch_lang_core = patch_core


def _sort_at_once(shipped: Any) -> None:
    """Triton's own sort is some hundred operations, half a second of them for 128 numbers."""
    import numpy as np
    import triton.language as tl

    def sort(x: Any, dim: int | None = None, descending: bool = False) -> Any:
        assert dim in (None, len(x.shape) - 1), f"Triton sorts along the last dimension, got {dim}"
        data = np.sort(x.handle.data, axis=-1)
        if descending:
            data = np.ascontiguousarray(data[..., ::-1])
        return tl.core.tensor(shipped.TensorHandle(data, x.handle.dtype), x.type)

    tl.sort = sort
