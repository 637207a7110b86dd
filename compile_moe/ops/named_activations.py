"""The named activations, as epilogue programs.

Gated names compute f(gate) * up; a name with the suffix ``_no_mul`` computes f alone on ungated columns.
``swigluoai`` is gpt-oss's: gate clamped above, up clamped on both sides, gate * sigmoid(alpha * gate) * (up + 1),
stored interleaved.
"""

from __future__ import annotations

import functools
import math

from compile_moe.ops import epilogue

_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "silu": ("sigmoid(gate)", "mul(gate, t0)"),
    "gelu": (
        f"mul(gate, {math.sqrt(0.5)!r})",
        "erf(t0)",
        "add(t1, 1.0)",
        "mul(gate, 0.5)",
        "mul(t3, t2)",
    ),
    "gelu_tanh": (
        "mul(gate, gate)",
        "mul(t0, gate)",
        "mul(t1, 0.044715)",
        "add(gate, t2)",
        f"mul(t3, {math.sqrt(2 / math.pi)!r})",
        "tanh(t4)",
        "add(t5, 1.0)",
        "mul(gate, 0.5)",
        "mul(t7, t6)",
    ),
    "relu2": ("maximum(gate, 0.0)", "mul(t0, t0)"),
}
NAMES: tuple[str, ...] = (*_FUNCTIONS, "swigluoai", *(f"{name}_no_mul" for name in _FUNCTIONS))
SWIGLUOAI_ALPHA = 1.702
SWIGLUOAI_LIMIT = 7.0


def _clamped(limit: float, steps: list[str]) -> tuple[str, str]:
    """Append the clamps of gpt-oss's gate and up; return the names of the clamped values."""
    steps += [f"minimum(gate, {limit!r})", f"maximum(up, {-limit!r})", f"minimum(t1, {limit!r})"]
    return "t0", "t2"


@functools.cache
def program_text(
    name: str, alpha: float | None = None, limit: float | None = None, interleaved: bool | None = None
) -> str:
    """Epilogue text of a named activation.

    Args:
        name: one of :data:`NAMES`.
        alpha: factor inside the sigmoid; swigluoai and silu only (default 1.702 and 1).
        limit: gate is clamped to at most limit, up to [-limit, limit]; swigluoai and silu only (default 7 and none).
        interleaved: gate at even and up at odd columns; default True for swigluoai, False for the others.

    Raises:
        ValueError: unknown name, or a parameter that the activation doesn't have.
    """
    if name not in NAMES:
        raise ValueError(
            f"activation must be one of {', '.join(NAMES)}, an Activation or a callable, got {name!r}"
        )
    if name not in ("swigluoai", "silu") and (alpha is not None or limit is not None):
        raise ValueError(f"alpha and limit belong to swigluoai and silu; {name!r} takes neither")
    for parameter, value in (("alpha", alpha), ("limit", limit)):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{parameter} must be a finite number, got {value!r}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be positive, got {limit!r}")
    gated = not name.endswith("_no_mul")
    if interleaved is None:
        interleaved = name == "swigluoai"
    if interleaved and not gated:
        raise ValueError(f"{name!r} has no up columns to interleave; leave interleaved=False")
    steps: list[str] = []
    if name in ("swigluoai", "silu") and (name == "swigluoai" or alpha is not None or limit is not None):
        gate, up = "gate", "up"
        if name == "swigluoai":
            alpha = SWIGLUOAI_ALPHA if alpha is None else alpha
            limit = SWIGLUOAI_LIMIT if limit is None else limit
        if limit is not None:
            gate, up = _clamped(float(limit), steps)
        steps.append(f"mul({gate}, {1.0 if alpha is None else float(alpha)!r})")
        steps.append(f"sigmoid(t{len(steps) - 1})")
        steps.append(f"mul({gate}, t{len(steps) - 1})")
        activated = f"t{len(steps) - 1}"
        if name == "swigluoai":
            steps.append(f"add({up}, 1.0)")
            up = f"t{len(steps) - 1}"
    else:
        steps += _FUNCTIONS[name.removesuffix("_no_mul")]
        activated, up = f"t{len(steps) - 1}", "up"
    if gated:
        steps.append(f"mul({activated}, {up})")
    layout = ("interleaved" if interleaved else "concatenated") if gated else "ungated"
    numbered = [f"t{i} = {step}" for i, step in enumerate(steps)]
    return epilogue.parse("; ".join([layout, *numbered, f"return t{len(steps) - 1}"])).text()


def resolve(activation: str) -> str:
    """Epilogue text for a name, or for a text that is an epilogue already."""
    return epilogue.parse(activation).text() if ";" in activation else program_text(activation)
