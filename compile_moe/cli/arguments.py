"""What the commands have in common: lists of numbers as arguments, and how refusals end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from compile_moe.cli.refusal import Refusal


def numbers(given: str) -> tuple[int, ...]:
    """Of "1,16,64"."""
    try:
        return tuple(int(number) for number in given.split(","))
    except ValueError:
        raise typer.BadParameter(f"must be numbers separated by commas, got {given}") from None


def exponents(given: str) -> tuple[float, ...]:
    """Of "0,0.5,1"."""
    try:
        return tuple(float(number) for number in given.split(","))
    except ValueError:
        raise typer.BadParameter(f"must be numbers separated by commas, got {given}") from None


@contextmanager
def refusing() -> Iterator[None]:
    """End with a line and status 2 where what was given can't work."""
    try:
        yield
    except Refusal as refusal:
        Console(stderr=True, soft_wrap=True).print(f"error: {refusal}", markup=False, highlight=False)
        raise typer.Exit(2) from None
