"""Options of ``compile-moe simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_moe.cli.arguments import exponents, numbers, refusing
from compile_moe.cli.explain import own_shape
from compile_moe.cli.moe_layer import MODELS
from compile_moe.cli.simulate import DTYPES, SimulateOptions, run_simulate


def simulate_command(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(MODELS)}; or a folder with a config.json. Default: deepseek-v3, unless sizes are given."
        ),
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="K, of a shape of your own.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="I, of one expert.")] = None,
    num_experts: Annotated[int | None, typer.Option(help="Number of experts.")] = None,
    topk: Annotated[int | None, typer.Option(help="Experts of a token.")] = None,
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks, separated by commas; each has one GPU.")
    ] = ",".join(map(str, SimulateOptions.ranks)),
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = SimulateOptions.tokens,
    skew: Annotated[
        str,
        typer.Option(
            help="Exponents, separated by commas: the expert of rank r is chosen as often as r ** -skew."
        ),
    ] = ",".join(map("{:g}".format, SimulateOptions.skews)),
    dispatch: Annotated[
        str, typer.Option(help=f"What tokens travel in: {', '.join(DTYPES)}. Results come back in bfloat16.")
    ] = SimulateOptions.dispatch,
    weights: Annotated[
        str, typer.Option(help=f"What the experts' weights are stored in: {', '.join(DTYPES)}.")
    ] = SimulateOptions.weights,
    kernels: Annotated[
        Path | None,
        typer.Option(help="File of bench --part experts --json: its times, in place of the next four."),
    ] = None,
    matmul: Annotated[float, typer.Option(help="TFLOP/s.")] = SimulateOptions.matmul,
    copy: Annotated[float, typer.Option(help="TB/s of memory.")] = SimulateOptions.copy,
    share: Annotated[
        float, typer.Option(help="Of those that the experts' GEMMs reach.")
    ] = SimulateOptions.share,
    overhead: Annotated[
        float, typer.Option(help="Microseconds that the experts take beyond that.")
    ] = SimulateOptions.overhead,
    node_size: Annotated[
        int, typer.Option(help="Ranks of a node, with faster links between them.")
    ] = SimulateOptions.node_size,
    node_bandwidth: Annotated[
        float, typer.Option(help="GB/s of a rank to its node, in each direction.")
    ] = SimulateOptions.node_bandwidth,
    network_bandwidth: Annotated[
        float, typer.Option(help="GB/s of a rank to other nodes, in each direction.")
    ] = SimulateOptions.network_bandwidth,
    node_latency: Annotated[
        float, typer.Option(help="Microseconds of an exchange inside a node.")
    ] = SimulateOptions.node_latency,
    network_latency: Annotated[
        float, typer.Option(help="Microseconds of one that leaves it.")
    ] = SimulateOptions.network_latency,
    plot: Annotated[
        Path | None, typer.Option(help="File, .png or .svg, for times over ranks, and their parts.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the routing.")] = SimulateOptions.seed,
) -> None:
    """Estimate a layer whose experts lie on many ranks: numbers, no GPUs.

    Every token travels once to each rank that has an expert of it, and one sum of each comes back; nothing overlaps.
    What the defaults say of links and kernels is nominal (H100, NVLink, 400 Gb/s network), not measured.
    """
    sizes = {
        "--hidden-size": hidden_size,
        "--intermediate-size": intermediate_size,
        "--num-experts": num_experts,
        "--topk": topk,
    }
    with refusing():
        shape = own_shape(sizes, model, 0)
        run_simulate(
            SimulateOptions(
                model,
                shape and shape[:4],
                numbers(ranks),
                tokens,
                exponents(skew),
                dispatch,
                weights,
                kernels,
                matmul,
                copy,
                overhead,
                share,
                node_size,
                node_bandwidth,
                network_bandwidth,
                node_latency,
                network_latency,
                plot,
                seed,
            )
        )
