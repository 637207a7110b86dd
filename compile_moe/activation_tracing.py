"""From a PyTorch callable over gate/up columns to an epilogue program.

The callable is traced with make_fx on a small meta tensor (ROWS, N);
:mod:`compile_moe.ops.graph_to_epilogue` translates the graph, or says what stopped it.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from compile_moe.ops.graph_to_epilogue import ROWS, GraphToEpilogue, NotPointwise

aten = torch.ops.aten


def trace(function: Callable[..., Tensor], owner: Any, num_columns: int) -> tuple[str, str]:
    """Epilogue text and ""; or "" and the reason why there is none.

    Args:
        function: the callable, or the function of a bound method.
        owner: the object a bound method is bound to, or None.
        num_columns: N.
    """
    call = (lambda x: function(x)) if owner is None else (lambda x: function(owner, x))
    gate_up = torch.empty(ROWS, num_columns, device="meta")
    try:
        with torch.no_grad():
            graph = make_fx(call, decomposition_table=_decompositions())(gate_up).graph
    except Exception as error:  # whatever a user's function raises on a meta tensor
        first_line = str(error).partition("\n")[0]
        return "", f"tracing it raised {type(error).__name__}: {first_line}"
    try:
        return GraphToEpilogue(num_columns).program(graph).text(), ""
    except NotPointwise as refusal:
        return "", str(refusal)


_cache: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[str, str]]] = weakref.WeakKeyDictionary()


def trace_cached(function: Callable[..., Tensor], owner: Any, num_columns: int) -> tuple[str, str]:
    """:func:`trace`, remembered for eager calls as long as the callable lives and the scalars it captured are the
    same: in its closure, its defaults and the globals that it names, themselves, in lists and dicts, or as attributes
    of objects and modules there, and the attributes of the callable itself or of what it is bound to.
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


def _captured_scalars(function: Any, owner: Any) -> tuple[Hashable, ...]:
    values: list[Any] = [owner, function]
    values += getattr(function, "__defaults__", None) or ()
    values += (getattr(function, "__kwdefaults__", None) or {}).values()
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # a cell that is not filled yet
            values.append(None)
    names: tuple[str, ...] = ()
    if (code := getattr(function, "__code__", None)) is not None:
        names = code.co_names
        values += [function.__globals__.get(name) for name in names]
    scalars: list[Hashable] = []
    for value in values:
        if isinstance(value, _SCALARS):
            scalars.append(value)
        elif isinstance(value, (list, tuple, dict)):
            contents = value.values() if isinstance(value, dict) else value
            scalars += (v for v in contents if isinstance(v, _SCALARS))
        elif isinstance(value, types.ModuleType):
            scalars += (v for name in names if isinstance(v := getattr(value, name, None), _SCALARS))
        elif not isinstance(value, (type, types.FunctionType)) and hasattr(value, "__dict__"):
            scalars += (v for v in vars(value).values() if isinstance(v, _SCALARS))
    return tuple(scalars)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import get_decompositions

    return get_decompositions(
        [
            aten.silu,
            aten.gelu,
            aten.softplus,
            aten.mish,
            aten.elu,
            aten.celu,
            aten.leaky_relu,
            aten.hardtanh,
            aten.hardsigmoid,
            aten.hardswish,
            aten.log_sigmoid_forward,
            aten.threshold,
            aten.softshrink,
            aten.hardshrink,
            aten.square,
            aten.relu6,
            aten.addcmul,
            aten.addcdiv,
            aten.lerp,
            aten.sinc,
            aten.xlogy,
        ]
    )
