"""Gluon functions computed by torch on a CPU, one program after another: Triton's interpreter has none of Gluon.

What it shows: numbers, indices and loops. Layouts, which thread holds what, and when copies arrive are left out: a copy
to shared memory is there at once. Integers have 64 bits. Loads and stores outside a tensor's memory fail.
"""

from __future__ import annotations

import builtins
import itertools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton.language as tl

DTYPES = {
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.int32: torch.int64,
    tl.int64: torch.int64,
    tl.uint8: torch.uint8,
    tl.uint32: torch.int64,
    tl.int8: torch.int8,
    tl.float8e4nv: torch.float8_e4m3fn,
}
TRITON_DTYPES = {
    torch_dtype: dtype for dtype, torch_dtype in DTYPES.items() if dtype not in (tl.int32, tl.uint32)
}


class _Anything:
    """A layout, which means nothing here."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __call__(self, *args: Any, **options: Any) -> _Anything:
        return self


ANYTHING = _Anything()


class Value:
    """A tensor or a number of a program."""

    type = ANYTHING

    def __init__(self, data: Any) -> None:
        self.data = data if isinstance(data, torch.Tensor) else torch.tensor(data)
        if self.data.dtype is torch.int32:
            self.data = self.data.long()

    @property
    def dtype(self) -> Any:
        return TRITON_DTYPES.get(self.data.dtype, tl.int1)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        if bitcast:
            if self.data.is_floating_point():
                return Value(self.data.view(torch.int32))
            bits = self.data & 0xFFFFFFFF
            return Value((bits - (bits >= 2**31).long() * 2**32).to(torch.int32).view(DTYPES[dtype]))
        return Value(self.data.to(DTYPES[dtype]))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __neg__(self) -> Value:
        return Value(-self.data)


def _data(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


def _operand(value: Any) -> Any:
    """What is computed with: of bytes, integers."""
    data = _data(value)
    is_byte = isinstance(data, torch.Tensor) and data.dtype in (torch.uint8, torch.int8)
    return data.long() if is_byte else data


def _quotient(a: Any, b: Any) -> Any:
    return torch.div(torch.as_tensor(a), b, rounding_mode="trunc").to(torch.int64)


def _remainder(a: Any, b: Any) -> Any:
    return torch.fmod(torch.as_tensor(a), torch.as_tensor(b))


def _install(name: str, compute: Callable[[Any, Any], Any]) -> None:
    def forward(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(compute(_operand(self), _operand(other)))

    def backward(self: Value, other: Any) -> Value:
        return Value(compute(_operand(other), _operand(self)))

    setattr(Value, f"__{name}__", forward)
    setattr(Value, f"__r{name}__", backward)


for _name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "lshift", "rshift"):
    _install(_name, getattr(operator, f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _install(_name, getattr(operator, _name))
_install("floordiv", _quotient)
_install("mod", _remainder)


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: torch.Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, torch.as_tensor(offsets)
        self.dtype = types.SimpleNamespace(element_ty=TRITON_DTYPES.get(memory.dtype, tl.int32))
        self.type = ANYTHING

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + _data(other))

    __radd__ = __add__

    def places(self, mask: torch.Tensor) -> torch.Tensor:
        inside = (self.offsets >= 0) & (self.offsets < self.memory.numel())
        assert bool((inside | ~mask).all()), "outside the tensor's memory"
        return torch.where(mask, self.offsets, 0)


class SharedMemory:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data
        self.shape = list(data.shape)
        self.dtype = TRITON_DTYPES[data.dtype]

    def index(self, i: Any) -> SharedMemory:
        return SharedMemory(self.data[int(i)])

    def load(self, layout: Any) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.data.copy_(value.data)


def load(pointer: Pointer, mask: Any = None, other: Any = 0, **options: Any) -> Value:
    offsets, where = torch.broadcast_tensors(
        pointer.offsets, torch.as_tensor(True if mask is None else _data(mask))
    )
    values = pointer.memory[Pointer(pointer.memory, offsets).places(where)]
    if values.dtype is torch.float8_e4m3fn:
        return Value(torch.where(where, values.float(), _data(other)).to(values.dtype))
    return Value(torch.where(where, values, torch.as_tensor(_data(other)).to(values.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    where = torch.as_tensor(True if mask is None else _data(mask))
    offsets, where, data = torch.broadcast_tensors(pointer.offsets, where, torch.as_tensor(_data(value)))
    places = Pointer(pointer.memory, offsets).places(where)
    pointer.memory[places[where]] = data[where].to(pointer.memory.dtype)


def copy_rows(smem: SharedMemory, pointers: Pointer, mask: Any = None) -> None:
    smem.store(Value(load(pointers, mask).data.expand(smem.data.shape)))


def view(smem: SharedMemory, shape: Sequence[int], layout: Any, dtype: Any = None) -> SharedMemory:
    return SharedMemory(smem.data.view(*map(int, shape)))


def mma_v2(a: Value, b: Value, acc: Value) -> Value:
    return Value(acc.data + (a.data.double() @ b.data.double()).float())


def _reduce(values: Any, axis: int, combine: Any) -> Any:
    assert combine.__name__ == "_add_each", "sums of a tuple of tensors are all that is computed here"
    return tuple(Value(value.data.sum(axis)) for value in values)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
    memory = torch.empty(*map(int, shape), dtype=DTYPES[dtype])
    return SharedMemory(memory.fill_(torch.nan if memory.is_floating_point() else 0xA5))


def _expand_dims(value: Any, axis: int) -> Any:
    if isinstance(value, Pointer):
        return Pointer(value.memory, value.offsets.unsqueeze(axis))
    return Value(value.data.unsqueeze(axis))


def _split(value: Value) -> tuple[Value, Value]:
    return Value(value.data[..., 0]), Value(value.data[..., 1])


def _binary(compute: Callable[..., Any]) -> Callable[..., Value]:
    def call(a: Any, b: Any, **options: Any) -> Value:
        return Value(compute(*map(torch.as_tensor, (_data(a), _data(b)))))

    return call


_LAYOUTS = (
    *("BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "DotOperandLayout"),
    *("DistributedLinearLayout", "NVMMADistributedLayout"),
)


_LIBDEVICE = types.SimpleNamespace(
    fast_expf=lambda value: Value(torch.exp(value.data)), fast_dividef=_binary(torch.div)
)


class Program:
    """The language, as one program sees it."""

    def __init__(self) -> None:
        self.pid: tuple[int, ...] = (0,)
        self.programs = 1

    def language(self) -> types.SimpleNamespace:
        def zeros(shape: Sequence[int], dtype: Any, layout: Any = None) -> Value:
            return Value(torch.zeros(*map(int, shape), dtype=DTYPES[dtype]))

        return types.SimpleNamespace(
            **{
                name: getattr(tl, name)
                for name in (
                    *("bfloat16", "float16", "float32", "float64", "float8e4nv"),
                    *("int8", "int32", "int64", "uint8", "uint32"),
                )
            },
            **{name: ANYTHING for name in _LAYOUTS},
            PropagateNan=tl.PropagateNan,
            constexpr=lambda value: value,
            static_assert=lambda condition, *message: None,
            static_range=builtins.range,
            program_id=lambda axis: Value(self.pid[axis]),
            num_programs=lambda axis: Value(self.programs),
            arange=lambda first, end, layout=None: Value(torch.arange(first, end)),
            cdiv=lambda a, b: (a + (b - 1)) // b,
            zeros=zeros,
            full=lambda shape, value, dtype, layout=None: Value(
                torch.full([*map(int, shape)], _data(value), dtype=DTYPES[dtype])
            ),
            fdiv=_binary(torch.div),
            fma=lambda a, b, c: Value((a.data.double() * b.data.double() + c.data.double()).float()),
            zeros_like=lambda value: Value(torch.zeros_like(value.data)),
            expand_dims=_expand_dims,
            broadcast=lambda a, b: tuple(map(Value, torch.broadcast_tensors(a.data, b.data))),
            where=lambda c, a, b: Value(torch.where(*map(torch.as_tensor, map(_data, (c, a, b))))),
            minimum=_binary(torch.minimum),
            maximum=_binary(torch.maximum),
            cumsum=lambda value, axis: Value(value.data.cumsum(axis)),
            max=lambda value, axis: Value(value.data.amax(axis)),
            sum=lambda value, axis: Value(value.data.sum(axis)),
            reduce=_reduce,
            reshape=lambda value, shape: Value(value.data.reshape(*map(int, shape))),
            permute=lambda value, order: Value(value.data.permute(*order)),
            split=_split,
            join=lambda a, b: Value(torch.stack([a.data, b.data], -1)),
            cast=lambda value, dtype: value.to(dtype),
            convert_layout=lambda value, layout, assert_trivial=False: value,
            allocate_shared_memory=_allocate,
            load=load,
            store=store,
        )


def on_cpu(function: Any, program: Program, replaced: dict[str, Any]) -> Callable[..., Any]:
    """A decorated or plain kernel function, and all that it calls, as Python that computes at once.

    Args:
        replaced: by name, what stands for functions that no CPU runs.
    """
    language = program.language()
    found: dict[int, Any] = {}

    def convert(name: str, value: Any) -> Any:
        if name in replaced:
            return replaced[name]
        if name in ("gl", "tl"):
            return language
        if name == "libdevice":
            return _LIBDEVICE
        if isinstance(value, tl.constexpr):
            return value.value
        if type(value).__name__ == "ConstexprFunction":
            # The others make layouts.
            return value.fn if value.fn.__annotations__.get("return") == "int" else ANYTHING
        if hasattr(value, "fn"):
            return rebuilt(value.fn)
        return value

    def rebuilt(plain: Any) -> Any:
        if id(plain) not in found:
            namespace: dict[str, Any] = {"__builtins__": builtins}
            found[id(plain)] = types.FunctionType(
                plain.__code__, namespace, plain.__name__, plain.__defaults__
            )
            for name in plain.__code__.co_names:
                if name in plain.__globals__:
                    namespace[name] = convert(name, plain.__globals__[name])
        return found[id(plain)]

    return rebuilt(getattr(function, "fn", function))  # type: ignore[no-any-return]


class KernelOnCpu:
    """A kernel that is launched as Triton's are, and adds its name and constants to ``launched`` then."""

    def __init__(
        self, kernel: Any, replaced: dict[str, Any], launched: list[tuple[str, dict[str, Any]]]
    ) -> None:
        self.program, self.launched = Program(), launched
        self.name: str = kernel.__name__
        self.names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
        self.function = on_cpu(kernel, self.program, replaced)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            given = [Pointer.of(a) if isinstance(a, torch.Tensor) else Value(a) for a in args]
            constants = {name: options[name] for name in self.names[len(args) :]}
            self.launched.append((self.name, constants))
            self.program.programs = grid[0]
            for self.program.pid in itertools.product(*map(range, grid)):
                self.function(*given, **constants)

        return run
