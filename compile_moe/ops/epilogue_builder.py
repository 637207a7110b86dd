"""Steps of an epilogue, emitted one by one: each once, with operands of the kind that its operation takes.

A value is the name of a step or of an input, or a literal: float, or bool for one that is true or false everywhere.
"""

from __future__ import annotations

import torch

from compile_moe.ops.epilogue import VOCABULARY, Layout, Operand, Program, Step

Value = str | float | bool


class StepBuilder:
    """Called with an operation and its operands, it gives the value of the step."""

    def __init__(self) -> None:
        # By text, where 0.0 and -0.0 are two.
        self._names: dict[str, str] = {}
        self._steps: list[Step] = []
        # Largest absolute values, where integers might not stay exact.
        self._bounds: dict[str, float] = {}

    def __call__(self, op: str, *operands: Value) -> Value:
        kind = VOCABULARY[op]
        operands = tuple(
            self.boolean(o) if i < kind.num_booleans else self.number(o) for i, o in enumerate(operands)
        )
        folded = _fold(op, operands)
        return self._step(op, operands) if folded is None else folded

    def number(self, value: Value) -> str | float:
        """The value as a number: 1 for true, 0 for false."""
        if self.is_boolean(value):
            return self._step("where", (value, 1.0, 0.0)) if isinstance(value, str) else float(value)
        return value if isinstance(value, str) else float(value)

    def boolean(self, value: Value) -> str | bool:
        """The value as a boolean: whether it isn't 0."""
        if isinstance(value, str) and not self.is_boolean(value):
            return self._step("ne", (value, 0.0))
        return value if isinstance(value, str) else bool(value)

    def is_boolean(self, value: Value) -> bool:
        if isinstance(value, str):
            return value.startswith("t") and VOCABULARY[self._steps[int(value[1:])].op].gives_boolean
        return isinstance(value, bool)

    def bound(self, value: Value) -> float:
        """No absolute value is larger; inf where the value may be no integer."""
        if isinstance(value, str):
            return 1.0 if self.is_boolean(value) else self._bounds.get(value, float("inf"))
        return abs(float(value)) if float(value).is_integer() else float("inf")

    def program(self, layout: Layout, result: str) -> Program:
        """The program that ends in ``result``, without the steps that it doesn't need."""
        needed: set[str] = {result}
        for i in range(len(self._steps) - 1, -1, -1):
            if f"t{i}" in needed:
                needed.update(o for o in self._steps[i].operands if isinstance(o, str))
        kept = [i for i in range(len(self._steps)) if f"t{i}" in needed]
        names = {f"t{old}": f"t{new}" for new, old in enumerate(kept)}

        def renamed(operand: Operand) -> Operand:
            return names.get(operand, operand) if isinstance(operand, str) else operand

        steps = tuple(Step(self._steps[i].op, tuple(map(renamed, self._steps[i].operands))) for i in kept)
        return Program(layout, steps, names.get(result, result))

    def _step(self, op: str, operands: tuple[Value, ...]) -> str:
        text = f"{op}{operands!r}"
        if text not in self._names:
            self._names[text] = f"t{len(self._steps)}"
            self._steps.append(Step(op, operands))
            self._bounds[self._names[text]] = self._bound_of(op, operands)
        return self._names[text]

    def _bound_of(self, op: str, operands: tuple[Value, ...]) -> float:
        bounds = [self.bound(o) for o in operands]
        if op in ("add", "sub"):
            return sum(bounds)
        if op == "mul":
            return bounds[0] * bounds[1] if 0 not in bounds else 0.0
        if op in ("neg", "abs", "maximum", "minimum", "where"):
            return max(bounds)
        return float("inf")


def _fold(op: str, operands: tuple[Value, ...]) -> Value | None:
    """The value if literals alone decide it."""
    if op in ("logical_and", "logical_or"):
        decisive = op == "logical_or"
        if decisive in operands:
            return decisive
        # The other literal leaves the other operand as it is.
        if not all(isinstance(o, str) for o in operands):
            return next((o for o in operands if isinstance(o, str)), not decisive)
    if op == "where" and isinstance(operands[0], bool):
        return operands[1] if operands[0] else operands[2]
    if any(isinstance(o, str) for o in operands):
        return None
    result: Value = (
        VOCABULARY[op]
        .torch_function(
            *(
                torch.tensor(o, dtype=torch.bool if isinstance(o, bool) else torch.float64, device="cpu")
                for o in operands
            )
        )
        .item()
    )
    return result
