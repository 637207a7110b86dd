"""Activation of a gate/up tensor: the epilogue of GEMM 1 as an op of its own, for where it can't be fused.

Args:
    gate_up: (..., N), any strides.
    epilogue: program text (see ``compile_moe.ops.epilogue``), such as that of a named activation.

Returns:
    (..., I) in gate_up's dtype, contiguous; I = N / 2 where the program is gated, else N. Computed in float32
    and rounded once.
"""

from __future__ import annotations

from torch import Tensor

from compile_moe.ops.epilogue import parse
from compile_moe.ops.kernels import act_and_mul as kernels
from compile_moe.ops.problem_size import check_float_dtype, require, shape
from compile_moe.ops.registry import OutputSpec, define_op


def check_columns(name: str, n: int, epilogue: str) -> None:
    """Check that N columns split into gate and up where ``epilogue`` is gated."""
    if epilogue and parse(epilogue).gated:
        require(n % 2 == 0, lambda: f"{name} must have an even number of columns (gate and up), got {n}")


def _check(gate_up: Tensor, epilogue: str) -> None:
    parse(epilogue)
    check_float_dtype("gate_up", gate_up)
    require(gate_up.dim() >= 1, lambda: f"gate_up must be (..., N), got {shape(gate_up)}")
    check_columns("gate_up", gate_up.size(-1), epilogue)


def _outputs(gate_up: Tensor, epilogue: str) -> tuple[OutputSpec, ...]:
    return (((*gate_up.shape[:-1], parse(epilogue).columns_out(gate_up.size(-1))), gate_up.dtype),)


def _torch(gate_up: Tensor, epilogue: str) -> Tensor:
    return parse(epilogue).evaluate(gate_up).contiguous()


def _launch(outputs: tuple[Tensor], gate_up: Tensor, epilogue: str) -> None:
    program = parse(epilogue)
    kernels.act_and_mul(
        outputs[0].view(-1, outputs[0].size(-1)),
        gate_up.reshape(-1, gate_up.size(-1)),
        program.triton_source(),
        program.layout,
    )


act_and_mul = define_op(
    "act_and_mul",
    "Tensor gate_up, str epilogue",
    ("out",),
    check=_check,
    outputs=_outputs,
    torch_impl=_torch,
    launch=_launch,
)
