"""Launching a compiled kernel by the function in C that all of Triton's ways end in.

On the way there Triton asks for the current device and stream, gathers what its launch hooks might want to know, and
calls them, at every launch: several times what the launch itself takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from triton import knobs

#: Among the arguments of a launch: the stream.
STREAM: Any = object()

Values = tuple[Any, ...]


class Place(NamedTuple):
    """Among the arguments of a launch: an address, ``offset`` bytes behind the start of memory number ``memory``."""

    memory: int
    offset: int


class DescribedPlace:
    """Among the arguments of a launch: a tensor descriptor over the memory at a place.

    Args:
        descriptor: Triton's, whatever tensor it is over.
    """

    def __init__(self, place: Place, descriptor: Any) -> None:
        self.place = place
        self.descriptor = descriptor


def with_base(descriptor: Any, base: Any) -> Any:
    """Like ``descriptor``, which has checked its shape and strides, over another tensor of that description."""
    copied = object.__new__(type(descriptor))
    vars(copied).update(vars(descriptor), base=base)
    return copied


class _Memory:
    """What Triton asks of a descriptor's tensor."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class DirectLaunch(NamedTuple):
    """A kernel that is launched with arguments out of values that are given at every launch.

    kernel, grid, arguments: for Triton's own way, ``kernel[grid](*arguments(values), stream=stream)``.
    run: called with ``outer(values)`` and, where it takes the kernel's arguments as one, ``inner(values)``.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Callable[[Values], Values]
    run: Callable[..., None]
    outer: Callable[[Values], Values]
    inner: Callable[[Values], Values] | None


class DirectLaunches(NamedTuple):
    """Launches in order; their values are the stream, the address of every place, what is described there, and the
    constants.
    """

    launches: tuple[DirectLaunch, ...]
    places: tuple[Place, ...]
    described: tuple[DescribedPlace, ...]
    constants: Values


def prepare(launches: Sequence[tuple[Any, tuple[int, int, int], Sequence[Any]]]) -> DirectLaunches:
    """
    Args:
        launches: compiled kernel, grid, and all arguments, of which those that differ from launch to launch are
            :class:`Place` or :class:`DescribedPlace`.
    """
    arguments = [argument for _, _, args in launches for argument in args]
    places = dict.fromkeys(a for a in arguments if isinstance(a, Place))
    described = tuple(a for a in arguments if isinstance(a, DescribedPlace))
    positions: dict[Any, int] = {known: i for i, known in enumerate((STREAM, *places, *described))}
    constants: list[Any] = []
    of_constants: dict[int, int] = {}

    def position(value: Any) -> int:
        if _differs(value):
            return positions[value]
        if id(value) not in of_constants:
            of_constants[id(value)] = len(positions) + len(constants)
            constants.append(value)
        return of_constants[id(value)]

    def pick(values: Sequence[Any]) -> Callable[[Values], Values]:
        # Of one item it gives no tuple; a launch has more.
        return itemgetter(*map(position, values))

    prepared = []
    for kernel, grid, args in launches:
        run, outer, inner = _end(kernel, grid, args)
        prepared.append(
            DirectLaunch(kernel, grid, pick(args), run, pick(outer), None if inner is None else pick(inner))
        )
    return DirectLaunches(tuple(prepared), tuple(places), described, tuple(constants))


def launch_all(call: DirectLaunches, stream: int, addresses: Sequence[int]) -> None:
    """Launch in order on the current device; ``addresses`` are those of the memory that the places are in."""
    places = [addresses[memory] + offset for memory, offset in call.places]
    described = [
        with_base(each.descriptor, _Memory(addresses[each.place.memory] + each.place.offset))
        for each in call.described
    ]
    values = (stream, *places, *described, *call.constants)
    if is_hooked():
        for launch in call.launches:
            launch.kernel[launch.grid](*launch.arguments(values), stream=stream)
        return
    for _, _, _, run, outer, inner in call.launches:
        if inner is None:
            run(*outer(values))
        else:
            run(*outer(values), inner(values))


def is_hooked() -> bool:
    """Whether somebody, as a profiler, has hooks around Triton's launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
    )


def _end(
    kernel: Any, grid: tuple[int, int, int], args: Sequence[Any]
) -> tuple[Callable[..., None], Values, Values | None]:
    """Where ``kernel[grid](*args)`` ends without hooks: a function, its arguments, :data:`STREAM` among them, and
    those of the kernel where they are one argument, the last.
    """
    run = kernel.run
    given = *grid, STREAM, kernel.function, kernel.packed_metadata, None, None, None, *args
    if not _only_hands_on(run):
        return run, given, None
    handed: list[Values] = []
    copied = copy.copy(run)
    copied.launch = lambda *arguments: handed.append(arguments)
    copied(*given)
    (outer,) = handed
    inner = outer[-1] if type(outer[-1]) is tuple else None
    if inner is not None:
        outer = outer[:-1]
    known = _places(given) == _places((*outer, *(inner or ())))
    return (run.launch, outer, inner) if known else (run, given, None)


def _places(values: Sequence[Any]) -> list[int]:
    return [id(value) for value in values if _differs(value)]


def _differs(value: Any) -> bool:
    """From launch to launch."""
    return value is STREAM or isinstance(value, Place | DescribedPlace)


def _only_hands_on(run: Any) -> bool:
    """Whether Triton's launcher of a kernel does nothing that depends on more than its arguments: no memory that it
    allocates, no instrumentation.
    """
    return (
        type(run).__module__ == "triton.backends.nvidia.driver"
        and getattr(run, "global_scratch_size", None) == 0
        and getattr(run, "profile_scratch_size", None) == 0
        and not getattr(run, "gsan_enabled", False)
        and callable(getattr(run, "launch", None))
    )
