"""Launching: device guard, kernel variants that load together so that graph capture never compiles, and launches that
are worked out once for each description of their arguments.
"""

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


class Plan(NamedTuple):
    """What one call of a launcher runs.

    key: everything that selects compiled code, except what differs among ``variants()``.
    launches: in order; their tensors are arguments of the launcher.
    variants: all launches that other numbers of tokens would choose under the same key. They compile and load at the
        key's first call, because inside a CUDA graph capture that is too late.
    """

    key: tuple[Hashable, ...]
    launches: Sequence[Launch]
    variants: Callable[[], Iterable[Launch]]


class _ReadyLaunch(NamedTuple):
    """A compiled kernel and its arguments, constants included; of tensors, where they stand in the launcher's."""

    compiled: Any
    grid: tuple[int, int, int]
    args: list[Any]
    tensors: tuple[tuple[int, int], ...]  # (position in args, position in the launcher's arguments)


_ready: dict[Hashable, tuple[_ReadyLaunch, ...]] = {}
_MOST_READY = 4096  # numbers of tokens and shapes; then all are worked out anew
_loaded: dict[Hashable, dict[Hashable, Any]] = {}
_lock = threading.Lock()


def pointer_key(t: Tensor) -> tuple[torch.dtype, bool]:
    """What Triton specializes a pointer argument on."""
    return t.dtype, t.data_ptr() % 16 == 0


def launch(plan: Callable[..., Plan], *arguments: Any) -> None:
    """Run ``plan(*arguments)`` on the device of the first argument.

    Args:
        plan: reads nothing of tensors but shape, strides, dtype, device and the alignment of their memory, and
            nothing that changes but its arguments.

    Raises:
        RuntimeError: the first call that needs a kernel is inside a CUDA graph capture.
    """
    device = arguments[0].device
    if not is_cuda(device):  # interpreted
        for each in plan(*arguments).launches:
            if all(each.grid):
                each.kernel[each.grid](*each.args, **each.options)
        return
    with _device_guard(device):
        signature = (plan, device.index, *map(_description, arguments))
        ready = _ready.get(signature)
        if ready is None:
            ready = _prepare(plan, arguments, device)
            if len(_ready) >= _MOST_READY:
                _ready.clear()
            _ready[signature] = ready
        for compiled, grid, args, tensors in ready:
            args = args.copy()
            for position, argument in tensors:
                args[position] = arguments[argument]
            compiled[grid](*args)


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _description(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16
    return argument


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if torch.cuda.current_device() == device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _prepare(
    make_plan: Callable[..., Plan], arguments: tuple[Any, ...], device: torch.device
) -> tuple[_ReadyLaunch, ...]:
    # Objects of their own: the caller may give one tensor twice, and two the next time.
    own = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    positions = {id(argument): i for i, argument in enumerate(own)}
    plan = make_plan(*own)
    key = (device.index, *plan.key)
    compiled = _loaded.get(key)
    if compiled is None:
        compiled = _load(key, plan.variants, device)
    ready = []
    for each in plan.launches:
        if not all(each.grid):
            continue
        x, y, z = (*each.grid, 1, 1)[:3]
        # A compiled kernel takes all parameters in order; those of the compiler are not among them.
        names = [p.name for p in each.kernel.params[len(each.args) :]]
        args = [None if isinstance(a, Tensor) else a for a in each.args]
        tensors = tuple((i, positions[id(a)]) for i, a in enumerate(each.args) if isinstance(a, Tensor))
        constants = [each.options[name] for name in names]
        ready.append(_ReadyLaunch(compiled[_variant(each)], (x, y, z), args + constants, tensors))
    return tuple(ready)


def _variant(launch: Launch) -> Hashable:
    return launch.kernel, *launch.options.values()


def _load(
    key: tuple[Hashable, ...], variants: Callable[[], Iterable[Launch]], device: torch.device
) -> dict[Hashable, Any]:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernels of {key[1]} are not compiled yet for these shapes, dtypes and this device, and can't be "
            "inside a CUDA graph capture; before capturing, call the layer and its router once, with any number of "
            "tokens; compile_moe.warm_up(w1, w2, topk) does so for the experts"
        )
    with _lock:
        if key in _loaded:
            return _loaded[key]

        def compile_and_load(launch: Launch) -> Any:
            with _device_guard(device):
                compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
                # The launcher property loads the module onto the device.
                _ = compiled.run
            return compiled

        launches = list(variants())
        with ThreadPoolExecutor() as pool:
            attempts = [pool.submit(compile_and_load, launch) for launch in launches]
        compiled = {}
        for launch, attempt in zip(launches, attempts, strict=True):
            # Triton doesn't promise that compiling in threads is safe: what is wrong is wrong alone, too.
            failed = attempt.exception() is not None
            compiled[_variant(launch)] = compile_and_load(launch) if failed else attempt.result()
        _loaded[key] = compiled
        return compiled
