"""Options of ``compile-moe simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_moe.cli.arguments import (
    HiddenSizeOption,
    IntermediateSizeOption,
    ModelOption,
    NumExpertsOption,
    TopkOption,
    exponents,
    numbers,
    refusing,
    sizes_by_option,
)
from compile_moe.cli.explain import own_shape
from compile_moe.cli.simulate import DTYPES, SimulateOptions, run_simulate


def simulate_command(
    model: ModelOption = None,
    hidden_size: HiddenSizeOption = None,
    intermediate_size: IntermediateSizeOption = None,
    num_experts: NumExpertsOption = None,
    topk: TopkOption = None,
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks, separated by commas; each has one GPU.")
    ] = ",".join(map(str, SimulateOptions.ranks)),
    tokens: Annotated[int, typer.Option(help="Tokens of each rank.")] = SimulateOptions.tokens,
    skew: Annotated[
        str,
        typer.Option(
            help="Exponents, separated by commas: the r-th most popular expert is chosen as often as r ** -skew."
        ),
    ] = ",".join(map("{:g}".format, SimulateOptions.skews)),
    exchange: Annotated[
        str,
        typer.Option(
            help="all_to_all: a token travels to each rank that has an expert of it; all_gather: to all ranks."
        ),
    ] = SimulateOptions.exchange,
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

    A sum comes back from each rank that a token travelled to; nothing overlaps.
    What the defaults say of links and kernels is nominal (H100, NVLink, 400 Gb/s network), not measured.
    """
    sizes = sizes_by_option(hidden_size, intermediate_size, num_experts, topk)
    with refusing():
        shape = own_shape(sizes, model, 0)
        run_simulate(
            SimulateOptions(
                model=model,
                sizes=shape and shape[:4],
                ranks=numbers(ranks),
                tokens=tokens,
                skews=exponents(skew),
                exchange=exchange,
                dispatch=dispatch,
                weights=weights,
                kernels=kernels,
                matmul=matmul,
                copy=copy,
                overhead=overhead,
                share=share,
                node_size=node_size,
                node_bandwidth=node_bandwidth,
                network_bandwidth=network_bandwidth,
                node_latency=node_latency,
                network_latency=network_latency,
                plot=plot,
                seed=seed,
            )
        )
