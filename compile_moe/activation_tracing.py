"""From a PyTorch callable over gate/up columns to an epilogue program.

The callable is traced with make_fx on a small fake tensor (ROWS, N), its in-place operations made functional;
:mod:`compile_moe.ops.graph_to_epilogue` translates the graph, or says what stopped it.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from compile_moe.ops.aten_formulas import BITWISE, FORMULAS
from compile_moe.ops.column_codes import MOVES
from compile_moe.ops.graph_to_epilogue import ROWS, NotPointwise, program_of

aten = torch.ops.aten


def trace(function: Callable[..., Tensor], owner: Any, num_columns: int) -> tuple[str, str]:
    """Epilogue text and ""; or "" and the reason why there is none.

    Args:
        function: the callable, or the function of a bound method.
        owner: the object a bound method is bound to, or None.
        num_columns: N.
    """
    call = (lambda x: function(x)) if owner is None else (lambda x: function(owner, x))
    try:
        # Apart from whatever is being traced around it: no symbol of this belongs to that.
        with torch._guards.tracing(None), _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
            gate_up = torch.empty(ROWS, num_columns)
            traced = make_fx(functionalize(call), _decompositions(), tracing_mode="fake")(gate_up)
    except Exception as error:  # whatever a user's function raises on a fake tensor
        first_line = str(error).partition("\n")[0]
        if "convert all Tensors to FakeTensors" in first_line:
            return "", "it uses a captured tensor"
        return "", f"tracing it raised {type(error).__name__}: {first_line}"
    source, *_, output = traced.graph.nodes
    try:
        return program_of(source, output.args[0]).text(), ""
    except NotPointwise as refusal:
        return "", str(refusal)


_cache: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[str, str]]] = weakref.WeakKeyDictionary()


def trace_cached(function: Callable[..., Tensor], owner: Any, num_columns: int) -> tuple[str, str]:
    """:func:`trace`, remembered for eager calls as long as the callable lives and the scalars it captured are the
    same: in its closure, its defaults, the globals that it names and what it is bound to, themselves, in lists and
    dicts, as attributes of objects there and of what those hold, and in the functions that it calls.
    """
    holder = function if owner is None else owner
    try:
        known = _cache.setdefault(holder, {})
    except TypeError:
        # Neither weakly referable nor hashable: traced at every call.
        return trace(function, owner, num_columns)
    key = (function if owner is not None else None, num_columns, _captured_scalars(function, owner))
    if key not in known:
        known[key] = trace(function, owner, num_columns)
    return known[key]


_SCALARS = (bool, int, float, str)
_BY_OTHER_NAMES = ("getattr", "vars", "__dict__", "attrgetter")
_MOST_STEPS = 4  # from one object to the next, as in self.config.limits["gate"]


def _captured_scalars(function: Any, owner: Any) -> tuple[Hashable, ...]:
    """All that tracing may read: of an object that which the code names."""
    scalars: list[Hashable] = []
    seen: set[int] = set()

    def visit(value: Any, names: frozenset[str], steps: int) -> None:
        if isinstance(value, _SCALARS):
            scalars.append(value)
            return
        if value is None or steps > _MOST_STEPS or id(value) in seen or isinstance(value, (type, Tensor)):
            return
        seen.add(id(value))
        names |= _names(value)
        held: list[Any]
        if isinstance(value, types.ModuleType):
            attributes = {} if value.__name__.partition(".")[0] == "torch" else vars(value)
            found = [attributes[name] for name in sorted(names) if name in attributes]
            held = [v for v in found if isinstance(v, (*_SCALARS, types.FunctionType))]
        elif isinstance(value, (list, tuple)):
            held = list(value)
        elif isinstance(value, dict):
            held = list(value.values())
        elif isinstance(value, types.MethodType):
            held = [value.__func__, value.__self__]
        elif isinstance(value, functools.partial):
            held = [value.func, value.args, value.keywords]
        elif isinstance(value, types.FunctionType):
            held = _held_by_function(value)
        else:
            attributes = getattr(value, "__dict__", {})
            kind: Any = type(value)
            names = _with_methods(kind, names)
            reads_any = not names.isdisjoint(_BY_OTHER_NAMES)
            held = [v for n, v in attributes.items() if n in names or (reads_any and isinstance(v, _SCALARS))]
        for v in held:
            visit(v, names, steps + 1)

    visit(function, frozenset(), 0)
    visit(owner, _names(function), 0)
    return tuple(scalars)


def _names(value: Any) -> frozenset[str]:
    """Globals and attributes that calling ``value`` may read."""
    if isinstance(value, types.FunctionType):
        return _names_in(value.__code__)
    kind = type(value)
    call = getattr(kind, "forward", None) or getattr(kind, "__call__", None)  # noqa: B004
    code = getattr(call, "__code__", None)
    return frozenset() if code is None else _names_in(code)


@functools.lru_cache(1000)
def _with_methods(kind: type, names: frozenset[str]) -> frozenset[str]:
    """``names``, and those in the methods and properties of ``kind`` that are among them, and so on."""
    pending, known = set(names), set(names)
    while pending:
        member = inspect.getattr_static(kind, pending.pop(), None)
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if isinstance(member, types.FunctionType) and not (member.__module__ or "").startswith("torch."):
            found = _names_in(member.__code__) - known
            pending |= found
            known |= found
    return frozenset(known)


@functools.lru_cache(1000)
def _names_in(code: types.CodeType) -> frozenset[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return frozenset(code.co_names).union(*map(_names_in, inner))


def _held_by_function(function: types.FunctionType) -> list[Any]:
    if (function.__module__ or "").partition(".")[0] == "torch":
        return []
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            pass
    return held + [function.__globals__.get(name) for name in sorted(_names(function))]


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Those that inductor uses, but for what :mod:`compile_moe.ops.aten_formulas` has a form of its own."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    inductors = [aten.elu, aten.gelu, aten.hardtanh, aten.leaky_relu]
    table = {**core_aten_decompositions(), **get_decompositions(inductors)}
    # Among them are decompositions into masks over columns, or into numbers of a dtype, which isn't known here.
    for kept in (*FORMULAS, *BITWISE, *MOVES):
        table.pop(kept, None)
    return table
