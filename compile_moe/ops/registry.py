"""Registration of the ops of namespace ``compile_moe``.

An op is declared once, by five functions with the same parameters: ``check`` (raises on bad arguments),
``outputs`` (shapes and dtypes), ``torch_impl`` (plain PyTorch: returns the results), ``launch`` (CUDA: writes the
results into given tensors) and nothing else: the functional overload, its fake and the ``.out`` overload follow, so
they can't drift apart. There are no backward formulas: the autograd rule raises, so that neither eager backward nor a
compiled joint graph detaches silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from compile_moe.ops.kernels.launch import current_recorder
from compile_moe.ops.kernels.launch import loading_everything as loading_everything
from compile_moe.ops.kernels.remembered_calls import remembering as remembering
from compile_moe.ops.untraced import untraced

NAMESPACE = "compile_moe"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_PLAIN = (Tensor, torch.nn.Parameter)
# Looked up once: every call of an op asks.
_num_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_innermost_transform = torch._C._functorch.peek_interpreter_stack

OutputSpec = tuple[tuple[int, ...], torch.dtype]

_cuda_implementations: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
_fake_callbacks: list[Callable[[], None]] = []


def on_fake_call(callback: Callable[[], None]) -> None:
    """Run ``callback`` before every fake (shape-only) call of an op; it should be quick once it has done its work.

    Tracing always reaches a fake before inductor lowers the graph, so this is where lowerings can be
    registered without importing inductor (about 1.5 s) into processes that never compile.
    """
    _fake_callbacks.append(callback)


def define_op(
    name: str,
    arguments: str,
    returns: tuple[str, ...],
    *,
    check: Callable[..., None],
    outputs: Callable[..., tuple[OutputSpec, ...]],
    torch_impl: Callable[..., Any],
    launch: Callable[..., None],
    autocast: bool = False,
) -> torch._ops.OpOverload:
    """Declare the overloads ``name`` and ``name.out`` and return the functional one.

    Args:
        name, arguments, returns: the parts of the schema; the first argument is a tensor whose device is that
            of the outputs.
        check: raises ValueError or TypeError; reads shapes, dtypes, devices and strides only.
        outputs: (shape, dtype) of each output. Outputs are fresh and contiguous.
        torch_impl: plain PyTorch for every device but CUDA; returns the output, or a tuple of them.
        launch: called as ``launch(outputs, *arguments)``; writes every element that is ever read.
        autocast: cast floating-point tensors to the autocast dtype, as torch does for its GEMMs.
    """
    single = len(returns) == 1

    def allocate(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        check(*args, **kwargs)
        return tuple(args[0].new_empty(shape, dtype=dtype) for shape, dtype in outputs(*args, **kwargs))

    def functional_torch(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return torch_impl(*args, **kwargs)

    @remembering
    def functional_cuda(*args: Any) -> Any:
        results = allocate(*args)
        launch(results, *args)
        return results[0] if single else results

    def functional_fake(*args: Any, **kwargs: Any) -> Any:
        for callback in _fake_callbacks:
            callback()
        results = allocate(*args, **kwargs)
        return results[0] if single else results

    result_types = ", ".join(f"Tensor {r}" for r in returns)
    LIBRARY.define(
        f"{name}({arguments}) -> {'Tensor' if single else f'({result_types})'}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    # Every device but CUDA runs plain PyTorch.
    LIBRARY.impl(name, untraced(functional_torch), "CompositeExplicitAutograd")
    LIBRARY.impl(name, untraced(functional_cuda), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", functional_fake, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _cuda_implementations[op] = functional_cuda
    LIBRARY.impl(name, untraced(_autograd(op, name)), "Autograd")
    if autocast:
        for device_type in ("cpu", "cuda"):
            LIBRARY.impl(name, untraced(_autocast(op, device_type)), f"Autocast{device_type.upper()}")

    def checked_out(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        outs = tuple(kwargs.pop(r) for r in returns)
        check(*args, **kwargs)
        _refuse_grad(f"{name}.out", (*args, *kwargs.values(), *outs))
        for r, out, (shape, dtype) in zip(returns, outs, outputs(*args, **kwargs), strict=True):
            if tuple(out.shape) != tuple(shape) or out.dtype is not dtype or out.device != args[0].device:
                raise ValueError(
                    f"{r} must be {tuple(shape)}, {dtype} on {args[0].device}, "
                    f"got {tuple(out.shape)}, {out.dtype} on {out.device}"
                )
            if not out.is_contiguous():
                raise ValueError(f"{r} must be contiguous, got strides {out.stride()}")
        return outs

    def out_torch(*args: Any, **kwargs: Any) -> None:
        outs = checked_out(args, kwargs)
        results = torch_impl(*args, **kwargs)
        for out, result in zip(outs, (results,) if single else results, strict=True):
            out.copy_(result)

    def out_cuda(*args: Any, **kwargs: Any) -> None:
        launch(checked_out(args, kwargs), *args, **kwargs)

    def out_fake(*args: Any, **kwargs: Any) -> None:
        checked_out(args, kwargs)

    out_arguments = ", ".join(f"Tensor({chr(97 + i)}!) {r}" for i, r in enumerate(returns))
    # Returns nothing: functionalization can't rewrite custom ops that return what they mutate.
    LIBRARY.define(f"{name}.out({arguments}, *, {out_arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(f"{name}.out", untraced(out_torch), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}.out", untraced(out_cuda), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}.out", out_fake, lib=LIBRARY)
    return op


def implementation(op: torch._ops.OpOverload, *tensors: Tensor | None) -> Callable[..., Any]:
    """What calling ``op`` on these tensors runs: the implementation itself, where the dispatcher would find nothing
    else to do on its way (some 10 µs a call); else ``op``.
    """
    return _cuda_implementations[op] if runs_directly(*tensors) else op


def runs_directly(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors is nothing but its CUDA implementation: plain tensors without gradients, outside
    of everything that traces or transforms.
    """
    if is_watched():
        return False
    grad = torch.is_grad_enabled()
    # One after the other, not all(): a generator takes as long as what it checks.
    for t in tensors:
        if t is not None and (
            type(t) not in _PLAIN or not t.is_cuda or t.is_neg() or (grad and t.requires_grad)
        ):
            return False
    return True


def is_watched() -> bool:
    """Whether something traces or transforms the ops that run."""
    return (
        torch.compiler.is_compiling()
        # What records a call looks on itself.
        or ((modes := _num_modes()) and modes > (current_recorder() is not None))
        or _tracing_state() is not None
        or _innermost_transform() is not None
        or torch.is_autocast_enabled("cuda")
        or forward_ad._current_level >= 0
    )


def define_composite(
    name: str, arguments: str, returns: str, implementation: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Declare an op that is nothing but calls of other ops; AOTAutograd expands it into them."""
    LIBRARY.define(f"{name}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, untraced(implementation), "CompositeImplicitAutograd")
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def no_backward_message(what: str) -> str:
    """Of an error: ``what`` has none."""
    return (
        f"{what} has no backward formula: this version runs the forward only. "
        "Call the layer under torch.no_grad() or torch.inference_mode()"
    )


def _autograd(op: torch._ops.OpOverload, name: str) -> Callable[..., Any]:
    """The autograd rule: results that need gradients raise when these are asked for.

    Not torch.library.register_autograd, which takes two more calls of the dispatcher where there is nothing to do.
    """

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    class WithoutBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(no_backward_message(f"{NAMESPACE}::{name}"))

    # No argument of these schemas is keyword-only: all arrive by position, however they were given.
    def autograd(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        # torch.func's transforms take no function of autograd from inside an op, so these raise before they run.
        is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if _have_tangents(tensors) or (needs_gradient and is_transformed):
            raise NotImplementedError(no_backward_message(f"{NAMESPACE}::{name}"))
        if needs_gradient:
            return WithoutBackward.apply(*args)
        run = implementation(op, *tensors)
        return below(*args) if run is op else run(*args)

    return autograd


def _have_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode differentiation goes through one of them."""
    if forward_ad._current_level < 0:
        return False
    floating = (t for t in tensors if t is not None and t.is_floating_point())
    return any(forward_ad.unpack_dual(t).tangent is not None for t in floating)


def _refuse_grad(name: str, values: tuple[Any, ...]) -> None:
    """Tensors that a caller hands in to be written to can't carry a graph, as with torch's own ``out=``."""
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
        raise RuntimeError(no_backward_message(f"{NAMESPACE}::{name}"))


def _autocast(op: torch._ops.OpOverload, device_type: str) -> Callable[..., Any]:
    def cast(value: Any, dtype: torch.dtype) -> Any:
        # float64 and tensors of other devices keep their dtype, as in torch's own autocast rules; what is stored in
        # float8 means nothing without its scale.
        eligible = (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dtype is not torch.float64
            and value.dtype.itemsize > 1
            and value.device.type == device_type
        )
        return value.to(dtype) if eligible else value

    def autocast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return op(*(cast(a, dtype) for a in args), **{k: cast(v, dtype) for k, v in kwargs.items()})

    return autocast
