"""Launching: device guard, kernels that load before a graph capture needs them, and launches that are worked out once
for each description of their arguments.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from compile_moe.ops.kernels.direct_launch import with_base

guards: Any = None
try:
    from torch._C._dynamo import guards
except ImportError:  # pragma: no cover - depends on the torch version
    pass


class Launch(NamedTuple):
    """A kernel with its grid, positional arguments, and constants and compiler options.

    An argument may be a tensor descriptor of Triton's, over one of the launcher's tensors.
    """

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
    others: plans for the same arguments but for a number of tokens that has another key; they load with this one.
    costly_others: the same, but they load with this one inside :func:`loading_everything` only.
    """

    key: tuple[Hashable, ...]
    launches: Sequence[Launch]
    variants: Callable[[], Iterable[Launch]]
    others: Sequence[Plan] = ()
    costly_others: Sequence[Plan] = ()


class ReadyLaunch(NamedTuple):
    """A compiled kernel and its arguments, constants included; of tensors, where they stand in the launcher's."""

    compiled: Any
    grid: tuple[int, int, int]
    args: list[Any]  # a descriptor without its tensor
    tensors: tuple[tuple[int, int], ...]  # (position in args, position in the launcher's arguments)


#: Sees what :func:`launch` runs: the launches, and the arguments of the launcher.
Recorder = Callable[[Sequence[ReadyLaunch], tuple[Any, ...]], None]

_ready: dict[Hashable, tuple[ReadyLaunch, ...]] = {}
_MOST_READY = 4096  # numbers of tokens and shapes; then all are worked out anew
_loaded: dict[Hashable, dict[Hashable, Any]] = {}
_lock = threading.Lock()

Sizes = tuple[int, ...]


def _empty_strided(sizes: Sizes, strides: Sizes, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cuda")


#: Memory of the current device. Inductor's way past the dispatcher: a quarter of the time of torch.empty.
empty_strided: Callable[[Sizes, Sizes, torch.dtype], Tensor] = getattr(
    guards, "_empty_strided_cuda", _empty_strided
)
#: Without making sure that CUDA is initialized, which it is where there are tensors.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Thread(threading.local):
    # Of the class: looking for what a thread has not set takes longer than all else here.
    recorder: Recorder | None = None
    everything = False


_thread = _Thread()


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
    with device_guard(device):
        signature = (plan, device.index, *map(_description, arguments))
        ready = _ready.get(signature)
        if ready is None or loads_everything():
            ready = _prepare(plan, arguments, device)
            if len(_ready) >= _MOST_READY:
                _ready.clear()
            _ready[signature] = ready
        if (recorder := current_recorder()) is not None:
            recorder(ready, arguments)
        for compiled, grid, args, tensors in ready:
            args = args.copy()
            for position, argument in tensors:
                tensor, descriptor = arguments[argument], args[position]
                args[position] = tensor if descriptor is None else with_base(descriptor, tensor)
            compiled[grid](*args)


def current_recorder() -> Recorder | None:
    """Of this thread."""
    return _thread.recorder


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Show every launch of this thread to ``recorder``."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def loads_everything() -> bool:
    """Whether this thread is inside :func:`loading_everything`."""
    return _thread.everything


def is_observed() -> bool:
    """Whether more comes of this thread's launches than that they run."""
    return _thread.everything or _thread.recorder is not None


@contextlib.contextmanager
def loading_everything() -> Iterator[None]:
    """Launches of this thread load every kernel that any number of tokens needs."""
    before = loads_everything()
    _thread.everything = True
    try:
        yield
    finally:
        _thread.everything = before


def current_stream(device_index: int) -> int:
    """As Triton wants it."""
    stream: int = driver.active.get_current_stream(device_index)
    return stream


def is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _description(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16
    return argument


def is_current_device(device_index: int) -> bool:
    return _current_device() == device_index


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if is_current_device(device.index) else torch.cuda.device(device)


def _prepare(
    make_plan: Callable[..., Plan], arguments: tuple[Any, ...], device: torch.device
) -> tuple[ReadyLaunch, ...]:
    # Objects of their own: the caller may give one tensor twice, and two the next time.
    own = [argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments]
    positions = {id(argument): i for i, argument in enumerate(own)}
    plan = make_plan(*own)
    compiled = _load(plan, device)
    for other in (*plan.others, *plan.costly_others) if loads_everything() else plan.others:
        _load(other, device)
    ready = []
    for each in plan.launches:
        if not all(each.grid):
            continue
        x, y, z = (*each.grid, 1, 1)[:3]
        # A compiled kernel takes all parameters in order; those of the compiler are not among them.
        names = [p.name for p in each.kernel.params[len(each.args) :]]
        bases = {i: base for i, a in enumerate(each.args) if (base := _base(a)) is not None}
        args = [
            a if i not in bases else None if a is bases[i] else with_base(a, None)
            for i, a in enumerate(each.args)
        ]
        tensors = tuple((i, positions[id(base)]) for i, base in bases.items())
        constants = [each.options[name] for name in names]
        ready.append(ReadyLaunch(compiled[_variant(each)], (x, y, z), args + constants, tensors))
    return tuple(ready)


def _base(argument: Any) -> Tensor | None:
    """The tensor that an argument is, or that it describes."""
    base = argument if isinstance(argument, Tensor) else getattr(argument, "base", None)
    return base if isinstance(base, Tensor) else None


def _variant(launch: Launch) -> Hashable:
    return launch.kernel, *launch.options.values()


def _load(plan: Plan, device: torch.device) -> dict[Hashable, Any]:
    """The compiled variants of a plan."""
    key = (device.index, *plan.key)
    if key in _loaded:
        return _loaded[key]
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the kernels of {plan.key[0]} are not compiled yet for these shapes, dtypes and this device, and can't be "
            "inside a CUDA graph capture; before capturing, call the layer and its router once, with at least as "
            "many tokens; compile_moe.warm_up(w1, w2, topk) compiles those of the experts for any number of tokens"
        )
    with _lock:
        if key in _loaded:
            return _loaded[key]

        def compile_and_load(launch: Launch) -> Any:
            with device_guard(device):
                compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
                # The launcher property loads the module onto the device.
                _ = compiled.run
            return compiled

        launches = list(plan.variants())
        with ThreadPoolExecutor() as pool:
            attempts = [pool.submit(compile_and_load, launch) for launch in launches]
        compiled = {}
        for launch, attempt in zip(launches, attempts, strict=True):
            # Triton doesn't promise that compiling in threads is safe: what is wrong is wrong alone, too.
            failed = attempt.exception() is not None
            compiled[_variant(launch)] = compile_and_load(launch) if failed else attempt.result()
        _loaded[key] = compiled
        return compiled
