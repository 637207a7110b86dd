"""Options of ``compile-moe bench-ranks``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compile_moe.cli.arguments import (
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
from compile_moe.cli.bench_ranks import DISPATCHES, BenchRanksOptions, run_bench_ranks
from compile_moe.cli.explain import own_shape


def bench_ranks_command(
    model: ModelOption = None,
    hidden_size: HiddenSizeOption = None,
    intermediate_size: IntermediateSizeOption = None,
    num_experts: NumExpertsOption = None,
    topk: TopkOption = None,
    tokens: Annotated[
        str, typer.Option(help="Numbers of tokens of each rank, separated by commas.")
    ] = ",".join(map(str, BenchRanksOptions.tokens)),
    dispatch: Annotated[
        str, typer.Option(help=f"Of {', '.join(DISPATCHES)}, separated by commas.")
    ] = ",".join(BenchRanksOptions.dispatches),
    dtype: DtypeOption = None,
    skew: Annotated[
        float, typer.Option(help="The r-th most popular expert is chosen as often as r ** -skew.")
    ] = BenchRanksOptions.skew,
    json: Annotated[Path | None, typer.Option(help="File for all numbers.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, tokens and routing.")] = BenchRanksOptions.seed,
    compile: Annotated[
        bool, typer.Option(help="Time what torch.compile makes of the layers and exchanges.")
    ] = BenchRanksOptions.compiled,
) -> None:
    """Time a MoE layer whose experts lie on several ranks, its exchanges, and the backend's own of the same bytes.

    Started on each by: torchrun --nproc-per-node=2 -m compile_moe bench-ranks. Each rank also holds all experts, for
    the comparison with a layer whose tokens don't travel. Beside it stands what simulate says, from kernels and links
    that are measured in the same run.
    """
    sizes = sizes_by_option(hidden_size, intermediate_size, num_experts, topk)
    with refusing():
        shape = own_shape(sizes, model, 0)
        run_bench_ranks(
            BenchRanksOptions(
                model,
                shape and shape[:4],
                numbers(tokens),
                tuple(dispatch.split(",")),
                dtype,
                skew,
                json,
                seed,
                compile,
            )
        )
