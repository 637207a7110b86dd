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
from compile_moe.ops.kernels.precision import dot_precision

_MOST_CALLS = 4096  # of one function; then all are forgotten
#: Allocated bytes above which a call is not remembered: kernels then take longer than the host, and memory is better
#: given back between them.
_MOST_BYTES = 64 * 2**20
_ALIGNMENT = 256

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


class _Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    args: list[Any]
    #: (position in args, which memory, bytes from its start): of the given tensors, the results, the scratch memory.
    addresses: tuple[tuple[int, int, int], ...]


class _Call(NamedTuple):
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    single: bool
    num_scratch_bytes: int
    launches: tuple[_Launch, ...]


_UNKNOWN: Any = object()
_remembered: dict[Callable[..., Any], dict[Hashable, _Call | None]] = {}


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which launches kernels on a GPU and returns fresh contiguous tensors, with a memory of its calls.

    What it returns and does may depend on its positional arguments' descriptions only; arguments that are no tensors
    must be hashable. Calls that compute anything by other means than :func:`launching.launch` are not remembered.
    """
    calls = _remembered.setdefault(function, {})

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if (
            launching.current_recorder() is not None
            or launching.loads_everything()
            or os.environ.get("COMPILE_MOE_DEBUG") == "1"
        ):
            return function(*arguments)
        given = [a for a in arguments if isinstance(a, Tensor)]
        addresses = [t.data_ptr() for t in given]
        key = _key(arguments, addresses)
        remembered = calls.get(key, _UNKNOWN)
        if remembered is _UNKNOWN:
            if len(calls) >= _MOST_CALLS:
                calls.clear()
            result, calls[key] = _recorded(function, arguments, given)
            return result
        if remembered is None:
            return function(*arguments)
        return _again(remembered, given[0].device, addresses)

    return call


def forget() -> None:
    """Forget all calls of all functions."""
    for calls in _remembered.values():
        calls.clear()


def _key(arguments: tuple[Any, ...], addresses: list[int]) -> Hashable:
    first = arguments[0]
    precision = dot_precision(first.dtype) if first.dtype is torch.float32 else None
    alignments = [address % 16 for address in addresses]
    return (
        precision,
        *alignments,
        *[(a.shape, a.stride(), a.dtype, a.get_device()) if isinstance(a, Tensor) else a for a in arguments],
    )


def _again(call: _Call, device: torch.device, addresses: list[int]) -> Any:
    with launching.device_guard(device):
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in call.results]
        scratch = torch.empty(call.num_scratch_bytes, dtype=torch.uint8, device=device)
        addresses = [*addresses, *[result.data_ptr() for result in results], scratch.data_ptr()]
        stream = launching.current_stream(device)
        for kernel, grid, args, places in call.launches:
            args = args.copy()
            for position, memory, offset in places:
                # Triton takes addresses, too, and asks the driver about tensors.
                args[position] = addresses[memory] + offset
            kernel[grid](*args, stream=stream)
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
            describes = any(launch.args[position] is not None for position, _ in launch.tensors)
            if describes or self.num_bytes > _MOST_BYTES:
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
            places = []
            for (position, _), tensor in zip(ready.tensors, tensors, strict=True):
                address = tensor.data_ptr()
                if address in index:
                    places.append((position, index[address], 0))
                    continue
                if address not in allocated:
                    return None
                if address not in offsets:
                    offsets[address] = num_bytes
                    num_bytes += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                places.append((position, len(own), offsets[address]))
            launches.append(_Launch(ready.compiled, ready.grid, ready.args, tuple(places)))
        specs = tuple((tuple(r.shape), r.dtype) for r in results)
        return _Call(specs, isinstance(result, Tensor), num_bytes, tuple(launches))
