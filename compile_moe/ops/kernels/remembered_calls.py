"""Functions that launch again what an earlier call with arguments of the same description launched.

The host's time for a layer of few tokens is more than the GPU's. What its checks, shapes and plans come to depends on
nothing but the description of the arguments (shape, strides, dtype, device, alignment), so a call that has passed them
is remembered as memory to allocate and kernels to launch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compile_moe.ops.kernels import launch as launching
from compile_moe.ops.kernels.direct_launch import DescribedPlace, DirectLaunches, Place, launch_all, prepare
from compile_moe.ops.kernels.precision import dot_precision

_MOST_CALLS = 4096  # of one function; then all are forgotten
#: Allocated bytes above which a call is not remembered: kernels then take longer than the host, and memory is better
#: given back between them.
_MOST_BYTES = 256 * 2**20
_ALIGNMENT = 256
_DEBUG = "COMPILE_MOE_DEBUG"
_DEBUG_KEY = os.environ.encodekey(_DEBUG)

_aten = torch.ops.aten
_ALLOCATING = {_aten.empty.memory_format, _aten.new_empty.default}
_VIEWING = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
    _aten.view.default,
    _aten.view.dtype,
}


class _Call(NamedTuple):
    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # sizes, strides, dtype
    single: bool
    num_scratch_bytes: int
    #: Memory: the given tensors, the results, the scratch memory.
    launches: DirectLaunches


_UNKNOWN: Any = object()
_CONSTANTS = frozenset((type(None), str, int, bool))
_remembered: dict[Callable[..., Any], dict[Hashable, _Call | None]] = {}


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which launches kernels on a GPU and returns fresh contiguous tensors, with a memory of its calls.

    What it returns and does may depend on its positional arguments' descriptions only; arguments that are no tensors
    must be hashable. Calls that compute anything by other means than :func:`launching.launch` are not remembered.
    """
    calls = _remembered.setdefault(function, {})

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if launching.is_observed() or _is_debugging():
            return function(*arguments)
        key, addresses = _description(arguments)
        remembered = calls.get(key, _UNKNOWN)
        if remembered is _UNKNOWN:
            if len(calls) >= _MOST_CALLS:
                calls.clear()
            given = [a for a in arguments if isinstance(a, Tensor)]
            result, calls[key] = _recorded(function, arguments, given)
            return result
        if remembered is None:
            return function(*arguments)
        device_index = arguments[0].get_device()
        if launching.is_current_device(device_index):
            return _again(remembered, device_index, addresses)
        with torch.cuda.device(device_index):
            return _again(remembered, device_index, addresses)

    return call


def forget() -> None:
    """Forget all calls of all functions."""
    for calls in _remembered.values():
        calls.clear()


def _is_debugging() -> bool:
    environment: Any = os.environ
    # Its own lookup encodes and decodes, which takes longer than all else that precedes a launch.
    data = getattr(environment, "_data", None)
    if data is None:
        return environment.get(_DEBUG) == "1"
    return _DEBUG_KEY in data and environment.get(_DEBUG) == "1"


def _description(arguments: tuple[Any, ...]) -> tuple[Hashable, list[int]]:
    """What a call is remembered by, and the addresses of its tensors."""
    key: list[Any] = []
    addresses = []
    bits = 0
    for argument in arguments:
        if type(argument) in _CONSTANTS or not isinstance(argument, Tensor):
            key.append(argument)
            continue
        address = argument.data_ptr()
        addresses.append(address)
        bits |= address
        dtype = argument.dtype
        # Contiguous tensors of one shape differ in the strides of dimensions that nobody steps along.
        strides = None if argument.is_contiguous() else argument.stride()
        key += argument.shape, strides, dtype, argument.get_device()
    if bits % 16:
        key += [address % 16 for address in addresses]
    if arguments[0].dtype is torch.float32:
        key.append(dot_precision(torch.float32))
    return tuple(key), addresses


def _again(call: _Call, device_index: int, addresses: list[int]) -> Any:
    empty_strided = launching.empty_strided
    results = [empty_strided(sizes, strides, dtype) for sizes, strides, dtype in call.results]
    addresses += [result.data_ptr() for result in results]
    if call.num_scratch_bytes:
        scratch = empty_strided((call.num_scratch_bytes,), (1,), torch.uint8)
        addresses.append(scratch.data_ptr())
    launch_all(call.launches, launching.current_stream(device_index), addresses)
    return results[0] if call.single else tuple(results)


class _Allocations(TorchDispatchMode):
    """The memory that a call allocates, and whether it does anything else than allocating, viewing and launching."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self.only = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATING:
            self.addresses.add(result.data_ptr())
        elif func not in _VIEWING:
            # An op of ours, too: from here on nobody sees what it does.
            self.only = False
        return result


def _recorded(
    function: Callable[..., Any], arguments: tuple[Any, ...], given: list[Tensor]
) -> tuple[Any, _Call | None]:
    """The result of a call, and what there is to remember of it; None: nothing that would give the same."""
    record = _Record(given)
    with launching.recording(record), _Allocations() as allocations:
        result = function(*arguments)
    return result, record.as_call(result, allocations.addresses) if allocations.only else None


class _Record:
    """What a call launches."""

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given
        self.launches: list[tuple[Any, list[Tensor]]] = []
        self.num_bytes = 0
        self.is_repeatable = True
        self._addresses = {t.data_ptr() for t in given}

    def __call__(self, ready: Sequence[launching.ReadyLaunch], arguments: tuple[Any, ...]) -> None:
        for launch in ready:
            tensors = [arguments[argument] for _, argument in launch.tensors]
            for tensor in tensors:
                if tensor.data_ptr() not in self._addresses:
                    self._addresses.add(tensor.data_ptr())
                    self.num_bytes += tensor.untyped_storage().nbytes()
            if self.num_bytes > _MOST_BYTES:
                self.is_repeatable = False
                self.launches.clear()
            if self.is_repeatable:
                # Alive until the call is over, so that no address means two of them.
                self.launches.append((launch, tensors))

    def as_call(self, result: Any, allocated: set[int]) -> _Call | None:
        """The call, if its results and its scratch memory are of the ``allocated`` addresses."""
        results = [result] if isinstance(result, Tensor) else list(result)
        own = self.given + results
        # By address: launchers take views and detached tensors.
        index = {tensor.data_ptr(): i for i, tensor in enumerate(own)}
        written = {tensor.data_ptr() for _, tensors in self.launches for tensor in tensors}
        if not (
            self.is_repeatable
            and len(index) == len(own)
            and all(tensor.numel() for tensor in own)
            and all(tensor.is_contiguous() for tensor in results)
            and {tensor.data_ptr() for tensor in results} <= allocated & written
        ):
            return None
        offsets: dict[int, int] = {}
        num_bytes = 0
        launches = []
        for ready, tensors in self.launches:
            args = list(ready.args)
            for (position, _), tensor in zip(ready.tensors, tensors, strict=True):
                address, descriptor = tensor.data_ptr(), args[position]
                if address in index:
                    place = Place(index[address], 0)
                elif address in allocated:
                    if address not in offsets:
                        offsets[address] = num_bytes
                        num_bytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                    place = Place(len(own), offsets[address])
                else:
                    return None
                args[position] = place if descriptor is None else DescribedPlace(place, descriptor)
            launches.append((ready.compiled, ready.grid, args))
        specs = tuple((tuple(r.shape), r.stride(), r.dtype) for r in results)
        return _Call(specs, isinstance(result, Tensor), num_bytes, prepare(launches))
