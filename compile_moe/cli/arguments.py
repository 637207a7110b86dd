"""What the commands have in common: options, lists of numbers as arguments, and how refusals end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from compile_moe.cli.moe_layer import MODELS
from compile_moe.cli.refusal import Refusal

DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU where there is one.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16. Default: float32 on the CPU, bfloat16 on a GPU."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(MODELS)}; or a folder with a config.json. Default: qwen3-30b-a3b, unless sizes are given."
    ),
]
HiddenSizeOption = Annotated[int | None, typer.Option(help="K, of a shape of your own.")]
IntermediateSizeOption = Annotated[int | None, typer.Option(help="I, of one expert.")]
NumExpertsOption = Annotated[int | None, typer.Option(help="Number of experts.")]
TopkOption = Annotated[int | None, typer.Option(help="Experts of a token.")]


def sizes_by_option(
    hidden_size: int | None, intermediate_size: int | None, num_experts: int | None, topk: int | None
) -> dict[str, int | None]:
    """A shape as it was given, for messages that name the options."""
    return {
        "--hidden-size": hidden_size,
        "--intermediate-size": intermediate_size,
        "--num-experts": num_experts,
        "--topk": topk,
    }


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
