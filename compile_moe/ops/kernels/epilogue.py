"""Kernels with an epilogue: a copy of a kernel function whose global ``epilogue`` is built from source text."""

from __future__ import annotations

import functools
import hashlib
import linecache
import textwrap
import types
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def epilogue(gate, up):
    """Placeholder that kernels name; :func:`with_epilogue` replaces it."""
    return gate


@functools.cache
def build_epilogue(body: str) -> Any:
    """``@triton.jit`` function (gate, up) with the given body lines."""
    source = "def epilogue(gate, up):\n" + textwrap.indent(body, "    ") + "\n"
    filename = f"<compile_moe epilogue {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    # Triton reads a function's source through inspect, which finds it here.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"tl": tl, "libdevice": libdevice, "__name__": __name__}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace["epilogue"])


@functools.cache
def with_epilogue(kernel: Callable[..., None], body: str, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """``kernel`` (an undecorated kernel function) as a Triton kernel that calls the epilogue with ``body``.

    An empty body leaves the placeholder: the gate passes through. Built once for each pair, so that Triton's caches,
    which hash the sources of called functions, see a distinct kernel.
    """
    replaced = build_epilogue(body) if body else epilogue
    copy = with_globals(kernel, {"epilogue": replaced})
    return triton.jit(copy, do_not_specialize=list(do_not_specialize))


def with_globals(function: Callable[..., Any], replaced: dict[str, Any]) -> Callable[..., Any]:
    """A copy of the function that finds other globals under these names."""
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    # Signature inspection must end at the copy.
    delattr(copy, "__wrapped__")
    return copy
