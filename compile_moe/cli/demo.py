"""``compile-moe demo``: a language model eager with Hugging Face's experts and compiled with ours, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli import kernel_count
from compile_moe.cli.generation import Comparison, Forward, Generation, Generator, Speed, compare
from compile_moe.cli.language_model import Block, choose_device, choose_dtype, encode, load, moe_block
from compile_moe.cli.refusal import Refusal

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class DemoOptions:
    """What the command line gives; None leaves the choice to the demo."""

    model: Path | None = None
    device: str | None = None
    dtype: str | None = None
    prompt: str = "A router sends each token to a few experts; a compiler sees through"
    max_new_tokens: int = 32
    experts: str = "eager"
    mode: str = "default"
    seed: int = 0


class Compilation(NamedTuple):
    """What dynamo counted while it compiled: breaks, compiled graphs, seconds of the calls that compiled."""

    graph_breaks: int
    compiles: int
    seconds: float


class Results(NamedTuple):
    """The table's numbers; pairs are (eager, compiled)."""

    comparison: Comparison
    num_tokens: int
    compilation: Compilation
    speeds: tuple[Speed, Speed]
    kernels: tuple[int, int]


def run_demo(options: DemoOptions) -> None:
    """Run both, print the table to stdout and the progress to stderr.

    Raises:
        Refusal: options that can't work here.
    """
    if options.max_new_tokens < 2:
        raise Refusal(
            f"--max-new-tokens must be at least 2, to have a token to decode, got {options.max_new_tokens}"
        )
    if options.mode not in MODES:
        raise Refusal(f"--mode must be {', '.join(MODES)}, got {options.mode}")
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    progress = Console(stderr=True)
    with torch.no_grad():
        with _stage(progress, "Loading the model"):
            language_model = load(options.model, options.experts, device, dtype, options.seed)
            model = language_model.model
            block = moe_block(model)
            prompt = encode(language_model, options.prompt, options.max_new_tokens)
        results = _measure(model, block, Generator(model, prompt, options.max_new_tokens), options, progress)
    table = _table(results, options.experts, prompt.size(1), type(block.module).__name__, device)
    place = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    parameters = sum(p.numel() for p in model.parameters())
    # As text: a folder's name may hold what rich takes for markup.
    table.title = Text(
        f"{language_model.name} ({parameters / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')})\n"
        f"{place}, torch {torch.__version__}"
    )
    # Not narrower where the output is no terminal, so that its lines can be searched.
    out = Console() if Console().is_terminal else Console(width=110)
    out.print(table)


def _measure(
    model: Any, block: Block, generator: Generator, options: DemoOptions, progress: Console
) -> Results:
    device = generator.prompt.device
    with _stage(progress, f"Generating: eager, experts {options.experts!r}"):
        expected = generator.generate(model)
        eager_speed = generator.speed(model)
        inputs = _inputs_of(block.module, generator, model, expected.tokens[0])
        eager_kernels = kernel_count.count(lambda: block.module(*inputs[0], **inputs[1]), device)
    model.set_experts_implementation(integration.NAME)
    try:
        generator.prefill(model)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Refusal(" ".join(str(error).split())) from error
    compiled = torch.compile(model, mode=options.mode)
    given, compilation = _generate_first(compiled, generator, progress)
    with _stage(progress, f"Generating: compiled, experts {integration.NAME!r}"):
        compiled_speed = generator.speed(compiled)
    with _stage(progress, "Compiling the MoE block by itself, to count its kernels"):
        alone = kernel_count.compile_for_count(block.module, device)
        alone(*inputs[0], **inputs[1])
        compiled_kernels = kernel_count.count(lambda: alone(*inputs[0], **inputs[1]), device)
    return Results(
        compare(expected, given),
        len(expected.tokens),
        compilation,
        (eager_speed, compiled_speed),
        (eager_kernels, compiled_kernels),
    )


def _generate_first(
    forward: Forward, generator: Generator, progress: Console
) -> tuple[Generation, Compilation]:
    """A generation whose first prompt and first single token compile."""
    from torch._dynamo.utils import counters

    def counted() -> tuple[int, int]:
        return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]

    before, start = counted(), time.perf_counter()
    with _stage(progress, "Compiling the prefill"):
        ids = generator.prefill(forward)[-1:].argmax(-1)
    with _stage(progress, "Compiling the decoding of one token"):
        generator.step(forward, ids[None])
    seconds = time.perf_counter() - start
    # Steps may still compile: a later token can differ from the first one in what dynamo guards on.
    generation = generator.generate(forward)
    breaks, compiles = (after - first for after, first in zip(counted(), before, strict=True))
    return generation, Compilation(breaks, compiles, seconds)


def _inputs_of(
    module: nn.Module, generator: Generator, forward: Forward, token: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``module`` gets as its arguments while the model decodes one token."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        generator.prefill(forward)
        generator.step(forward, generator.prompt.new_tensor([[token]]))
    finally:
        hook.remove()
    return seen[-1]


def _table(results: Results, experts: str, num_prompt: int, block: str, device: torch.device) -> Table:
    comparison, num_tokens, compilation, speeds, kernels = results
    if comparison.difference is None:
        tokens = f"all {num_tokens} equal"
    else:
        position, (expected, given), gap = comparison.difference
        tokens = f"differ from token {position + 1} on: {given} for {expected}, logits {gap:.1e} apart"
    table = Table(
        caption=f"Kernels of one {block} for one token, compiled by itself: {kernel_count.COUNTED[device.type]}."
    )
    table.add_column("")
    table.add_column(f"eager\nexperts {experts!r}", justify="right")
    table.add_column(f"compiled\nexperts {integration.NAME!r}", justify="right")
    table.add_row("Greedy tokens", str(num_tokens), tokens)
    table.add_row(
        "Max logit error", "", f"{comparison.max_error:.1e} (logits up to {comparison.max_logit:.1e})"
    )
    table.add_row("Graph breaks", "", str(compilation.graph_breaks))
    table.add_row("Compiles", "", f"{compilation.compiles} (in {compilation.seconds:.0f} s)")
    table.add_row(f"Prefill tokens/s ({num_prompt} tokens)", *(f"{speed.prefill:.0f}" for speed in speeds))
    table.add_row("Decode tokens/s", *(f"{speed.decode:.0f}" for speed in speeds))
    table.add_row("Kernels in the MoE block", *(str(number) for number in kernels))
    return table


@contextmanager
def _stage(console: Console, text: str) -> Iterator[None]:
    """Show that ``text`` is being done, and afterwards how long it took."""
    if not console.is_terminal:
        console.print(f"{text} ...", markup=False, highlight=False)
    start = time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield
    console.print(f"{text}: {time.perf_counter() - start:.1f} s", markup=False, highlight=False)
