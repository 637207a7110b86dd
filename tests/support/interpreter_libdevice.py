"""CUDA's libdevice for Triton's interpreter, which has no extern functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def add_libdevice(shipped: Any) -> None:
    """Elementwise functions of libdevice through torch's functions of the same name."""
    import triton.language.extra.cuda.libdevice as cuda_libdevice
    import triton.language.extra.libdevice as libdevice

    # Where torch has no function of that name, or one that means something else.
    own: dict[str, Callable[..., torch.Tensor]] = {
        "fabs": torch.abs,
        "rint": torch.round,
        "nearbyint": torch.round,
        "round": lambda x: torch.trunc(x + torch.copysign(torch.full_like(x, 0.5), x)),
        "remainder": lambda x, y: x - y * torch.round(x / y),
        "fma": lambda x, y, z: (x.double() * y.double() + z.double()).to(x.dtype),
        "powi": torch.pow,
        "fdivide": torch.true_divide,
        "div_rn": torch.true_divide,
        "sqrt_rn": torch.sqrt,
        "rcp_rn": torch.reciprocal,
        "exp10": lambda x: torch.pow(10.0, x),
        "saturate": lambda x: torch.clamp(x, 0.0, 1.0),
    }

    def function_of(symbol: str) -> Callable[..., torch.Tensor]:
        name = symbol.removeprefix("__nv_").removeprefix("fast_")
        # The type is a letter at either end: __nv_tanhf, __nv_fdiv_rn, __nv_ddiv_rn.
        base = name.removesuffix("f")
        found = own.get(base) or own.get(name[1:]) or getattr(torch, name, None) or getattr(torch, base, None)
        if found is not None:
            return found
        raise NotImplementedError(f"{symbol} has no counterpart here: add one to add_libdevice")

    def extern_elementwise(
        self: Any, library: str, path: str, symbol: str, handles: list[Any], result_type: Any, is_pure: bool
    ) -> Any:
        operands = [torch.from_numpy(np.array(h.data, order="C")) for h in handles]
        result = function_of(symbol)(*operands).numpy()
        scalar = result_type.scalar
        return shipped.TensorHandle(result.astype(shipped._get_np_dtype(scalar)), scalar)

    shipped.InterpreterBuilder.create_extern_elementwise = extern_elementwise

    def interpreted(member: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(member)
        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = shipped.interpreter_semantic
            return member(*arguments, **named)

        return call

    # The compiler replaces the stubs of the portable module by those of the backend; the interpreter doesn't.
    for name, member in list(vars(cuda_libdevice).items()):
        if callable(member) and getattr(member, "__triton_builtin__", False):
            wrapped = interpreted(member)
            setattr(cuda_libdevice, name, wrapped)
            setattr(libdevice, name, wrapped)
