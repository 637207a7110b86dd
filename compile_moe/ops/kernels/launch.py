"""Launching: device guard, and kernel variants that load together so that graph capture never compiles."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A kernel with its grid, positional arguments, and constants and compiler options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


_loaded: set[Hashable] = set()
_lock = threading.Lock()


def pointer_key(t: Tensor) -> tuple[torch.dtype, bool]:
    """What Triton specializes a pointer argument on."""
    return t.dtype, t.data_ptr() % 16 == 0


def launch_all(
    key: tuple[Hashable, ...],
    launches: Sequence[Launch],
    variants: Callable[[], Iterable[Launch]],
    device: torch.device,
) -> None:
    """Run ``launches`` in order on ``device``.

    Args:
        key: everything that selects compiled code, except what differs among ``variants()``.
        variants: all launches that other numbers of tokens would choose under the same key. They compile and load
            at the key's first call, because inside a CUDA graph capture that is too late.

    Raises:
        RuntimeError: first call of a key inside a CUDA graph capture.
    """
    guard = _device_guard(device)
    with guard:
        if device.type == "cuda" and (device.index, *key) not in _loaded:
            _load((device.index, *key), variants, device)
        for launch in launches:
            if all(launch.grid):
                launch.kernel[launch.grid](*launch.args, **launch.options)


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Interpreted kernels run on CPU tensors.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _load(key: tuple[Hashable, ...], variants: Callable[[], Iterable[Launch]], device: torch.device) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernels of {key[1]} are not compiled yet for these shapes, dtypes and this device, and can't be "
            "inside a CUDA graph capture; before capturing, call the layer and its router once, with any number of "
            "tokens; compile_moe.warm_up(w1, w2, topk) does so for the experts"
        )
    with _lock:
        if key in _loaded:
            return

        def compile_and_load(launch: Launch) -> None:
            with _device_guard(device):
                compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
                # The launcher property loads the module onto the device.
                _ = compiled.run

        launches = list(variants())
        with ThreadPoolExecutor() as pool:
            attempts = [pool.submit(compile_and_load, launch) for launch in launches]
        for launch, attempt in zip(launches, attempts, strict=True):
            if attempt.exception() is not None:
                # Triton doesn't promise that compiling in threads is safe: what is wrong is wrong alone, too.
                compile_and_load(launch)
        _loaded.add(key)
