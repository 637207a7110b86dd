"""Command line of the library: ``compile-moe demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compile_moe.cli.demo import DemoOptions, run_demo
from compile_moe.cli.refusal import Refusal

app = typer.Typer(
    name="compile-moe", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _commands() -> None:
    """Fused Mixture-of-Experts layers that torch.compile sees through."""


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a local checkpoint. Default: a small Qwen3-MoE with random weights."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU where there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16. Default: float32 on the CPU, bfloat16 on a GPU."),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Text to continue. Without a tokenizer its bytes are the tokens.")
    ] = DemoOptions.prompt,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = DemoOptions.max_new_tokens,
    experts: Annotated[
        str, typer.Option(help="Experts implementation of transformers to compare with.")
    ] = DemoOptions.experts,
    mode: Annotated[str, typer.Option(help="Mode of torch.compile.")] = DemoOptions.mode,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = DemoOptions.seed,
) -> None:
    """Run a MoE language model eager with Hugging Face's experts and compiled with ours, and compare."""
    options = DemoOptions(model, device, dtype, prompt, max_new_tokens, experts, mode, seed)
    try:
        run_demo(options)
    except Refusal as refusal:
        Console(stderr=True, soft_wrap=True).print(f"error: {refusal}", markup=False, highlight=False)
        raise typer.Exit(2) from None


def main() -> None:
    """Entry point of the console script."""
    app()
