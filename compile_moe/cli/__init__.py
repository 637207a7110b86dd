"""Command line of the library, ``compile-moe``: demo, bench, explain, tune, simulate and bench-ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_moe.cli.arguments import (
    DeviceOption,
    DtypeOption,
    HiddenSizeOption,
    IntermediateSizeOption,
    ModelOption,
    NumExpertsOption,
    TopkOption,
    numbers,
    refusing,
    sizes_by_option,
)
from compile_moe.cli.bench import BenchOptions, own_shapes, run_bench
from compile_moe.cli.bench_ranks_command import bench_ranks_command
from compile_moe.cli.contestants import CONTESTANTS
from compile_moe.cli.demo import DemoOptions, run_demo
from compile_moe.cli.explain import ExplainOptions, own_shape, run_explain
from compile_moe.cli.simulate_command import simulate_command
from compile_moe.cli.tune import TuneOptions, run_tune

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
    device: DeviceOption = None,
    dtype: DtypeOption = None,
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
    with refusing():
        run_demo(options)


@app.command("bench")
def bench_command(
    model: ModelOption = None,
    hidden_size: HiddenSizeOption = None,
    intermediate_size: IntermediateSizeOption = None,
    num_experts: Annotated[
        str | None, typer.Option(help="Numbers of experts, separated by commas: the same work over each.")
    ] = None,
    topk: TopkOption = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = ",".join(
        map(str, BenchOptions.tokens)
    ),
    part: Annotated[
        str,
        typer.Option(
            help="block: norm, router, experts, residual, norm; experts: these alone, with random routing."
        ),
    ] = BenchOptions.part,
    contestants: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(CONTESTANTS)}, separated by commas; schemes and other libraries with "
            "--part experts only."
        ),
    ] = ",".join(BenchOptions.contestants),
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: Annotated[Path | None, typer.Option(help="File for all numbers and the kernels' names.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="File, .png or .svg, for the times over tokens or experts, their floor and the roofline."
        ),
    ] = None,
    host: Annotated[
        bool,
        typer.Option(
            "--host",
            help="Also compare the host time of an eager call with that of its kernels' bare launches.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = BenchOptions.seed,
) -> None:
    """Time a MoE layer with our experts and with those of transformers and other libraries, side by side.

    Compiled, with a dynamic number of tokens; on a GPU, replayed as a CUDA graph over 8 inputs. Other libraries run as
    they are. Results are compared before anything is timed.
    """
    counts, names = numbers(tokens), tuple(contestants.split(","))
    experts = None if num_experts is None else numbers(num_experts)
    with refusing():
        shapes = own_shapes(hidden_size, intermediate_size, experts, topk, model)
        run_bench(
            BenchOptions(
                model, shapes, counts, part, names, device, dtype, json=json, plot=plot, host=host, seed=seed
            )
        )


@app.command("explain")
def explain_command(
    model: ModelOption = None,
    hidden_size: HiddenSizeOption = None,
    intermediate_size: IntermediateSizeOption = None,
    num_experts: NumExpertsOption = None,
    topk: TopkOption = None,
    shared_intermediate_size: Annotated[
        int, typer.Option(help="I of a shared expert beside a shape of your own; 0: none.")
    ] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens of one call.")] = ExplainOptions.tokens,
    static: Annotated[
        bool, typer.Option("--static", help="Compile for this number of tokens only, not for any.")
    ] = False,
    activation: Annotated[
        str | None,
        typer.Option(
            help="In place of the model's own: FILE.py:FUNCTION, from gate_up (..., N) to (..., I), or a name such as "
            "gelu."
        ),
    ] = None,
    experts: Annotated[
        str,
        typer.Option(
            help="Experts implementation of transformers; 'grouped_mm' shows the layer without ours."
        ),
    ] = ExplainOptions.experts,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    html: Annotated[Path | None, typer.Option(help="File for the same as a web page.")] = None,
    svg: Annotated[Path | None, typer.Option(help="File for the same as a picture.")] = None,
) -> None:
    """Show which kernels a compiled MoE layer has, what was fused into each, and why something was not.

    The layer is RMSNorm, router, experts, residual and RMSNorm, of the model's own classes. It is compiled, but
    neither allocated nor run.
    """
    sizes = sizes_by_option(hidden_size, intermediate_size, num_experts, topk)
    with refusing():
        shape = own_shape(sizes, model, shared_intermediate_size)
        run_explain(
            ExplainOptions(model, shape, tokens, static, activation, experts, device, dtype, html, svg)
        )


@app.command("tune")
def tune_command(
    model: ModelOption = None,
    hidden_size: HiddenSizeOption = None,
    intermediate_size: IntermediateSizeOption = None,
    num_experts: NumExpertsOption = None,
    topk: TopkOption = None,
    tokens: Annotated[
        str,
        typer.Option(help="Numbers of tokens, separated by commas; each serves those from half to twice it."),
    ] = ",".join(map(str, TuneOptions.tokens)),
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    skew: Annotated[
        float,
        typer.Option(
            help="Exponent of the skewed routing: the r-th most popular expert is as likely as r ** -skew."
        ),
    ] = TuneOptions.skew,
    exhaustive: Annotated[
        bool,
        typer.Option("--exhaustive", help="Every tile there is, hundreds, not only those near the fastest."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: where layers look for them.")
    ] = None,
) -> None:
    """Time both GEMMs of a layer with many tiles on this GPU, and keep the best for later runs.

    From the tile that it has without tuning and one of each other kind the search goes to neighbours of the fastest.
    Even and skewed routing count alike. Interrupted, the same command goes on where it was.
    """
    sizes = sizes_by_option(hidden_size, intermediate_size, num_experts, topk)
    with refusing():
        shape = own_shape(sizes, model, 0)
        sizes_given = shape and shape[:4]
        run_tune(TuneOptions(model, sizes_given, numbers(tokens), dtype, device, skew, exhaustive, output))


app.command("simulate")(simulate_command)
app.command("bench-ranks")(bench_ranks_command)


def main() -> None:
    """Entry point of the console script."""
    app()
