"""``compile-moe bench``: a MoE layer with our experts and with those of others, timed side by side."""

from __future__ import annotations

import functools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

from compile_moe.cli import bench_plot
from compile_moe.cli.arguments import sizes_by_option
from compile_moe.cli.bench_results import Measurement, Results, as_json, describe, tables
from compile_moe.cli.contestants import CONTESTANTS, EXPERTS_ONLY
from compile_moe.cli.contestants.contestant import Contestant
from compile_moe.cli.contestants.transformers_experts import REFERENCE
from compile_moe.cli.explain import own_shape
from compile_moe.cli.language_model import choose_device, choose_dtype
from compile_moe.cli.measurement import Bench, attempt
from compile_moe.cli.moe_layer import configuration, custom_configuration, make_layer
from compile_moe.cli.refusal import Refusal, write_whole, writing
from compile_moe.cli.timing import measure_ceilings

PARTS = ("block", "experts")


class OwnShapes(NamedTuple):
    """Layers that differ in their number of experts alone."""

    hidden_size: int
    intermediate_size: int
    num_experts: tuple[int, ...]
    topk: int


@dataclass(frozen=True)
class BenchOptions:
    """What the command line gives; None leaves the choice to the bench.

    shapes: in place of a model. host: measure the host time of eager calls, too.
    """

    model: str | None = None
    shapes: OwnShapes | None = None
    tokens: tuple[int, ...] = (1, 16, 64, 1024)
    part: str = "block"
    contestants: tuple[str, ...] = CONTESTANTS[:2]
    device: str | None = None
    dtype: str | None = None
    json: Path | None = None
    plot: Path | None = None
    host: bool = False
    seed: int = 0


def own_shapes(
    hidden_size: int | None,
    intermediate_size: int | None,
    num_experts: tuple[int, ...] | None,
    topk: int | None,
    model: str | None,
) -> OwnShapes | None:
    """The shapes, if they were given; None where a model is to be taken.

    Raises:
        Refusal: some of the sizes only, or sizes beside a model.
    """
    number = num_experts[0] if num_experts else None
    sizes = sizes_by_option(hidden_size, intermediate_size, number, topk)
    shape = own_shape(sizes, model, 0)
    if shape is None or num_experts is None:
        return None
    return OwnShapes(shape[0], shape[1], num_experts, shape[3])


def run_bench(options: BenchOptions) -> None:
    """Measure, print the tables to stdout and the progress to stderr; after an interruption, what there is until then.

    Raises:
        Refusal: options that can't work here.
    """
    _check(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if options.host and device.type != "cuda":
        raise Refusal("--host needs a CUDA device: on a CPU there are no kernels to launch; leave it out")
    configs, name = _configurations(options)
    if options.plot is not None:
        bench_plot.require(options.plot)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:  # refused before the work is done
            with writing(option, path):
                path.open("a").close()
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs capture the current one

    def save(results: Results) -> None:
        if options.json is not None:
            with writing("--json", options.json):
                write_whole(options.json, json.dumps(as_json(results), indent=1) + "\n")

    with torch.no_grad(), _interrupted_when_terminated():
        results = measure(configs, name, options, device, dtype, save)
    out = Console() if Console().is_terminal else Console(width=110)
    for table in tables(results):
        out.print(table)
    if options.plot is not None:
        with writing("--plot", options.plot):
            bench_plot.picture(results).savefig(options.plot)
    if not results.complete:
        raise SystemExit(128 + signal.SIGINT)


def measure(
    configs: dict[int | None, Any],
    model: str,
    options: BenchOptions,
    device: torch.device,
    dtype: torch.dtype,
    save: Callable[[Results], None],
) -> Results:
    """All contestants at all numbers of experts and of tokens, or those until an interruption.

    ``save`` gets what there is after each of them.
    """
    import transformers
    import triton

    results = Results(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        {module.__name__: module.__version__ for module in (torch, triton, transformers)},
        model,
        options.part,
        str(dtype).removeprefix("torch."),
        measure_ceilings(device, dtype, options.contestants),
        complete=False,
    )
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(configs) * len(options.contestants) * len(options.tokens))

        def add(measurement: Measurement) -> None:
            nonlocal results
            results = results._replace(measurements=(*results.measurements, measurement))
            save(results)
            progress.console.print(describe(measurement), markup=False, highlight=False)
            progress.advance(task)

        try:
            for num_experts, config in configs.items():
                layer = attempt(functools.partial(make_layer, config, REFERENCE, device, dtype, options.seed))
                bench = (
                    layer
                    if isinstance(layer, str)
                    else Bench(layer, options.part == "block", results.ceilings)
                )
                for name in options.contestants:
                    progress.update(task, description=name)
                    contestant = bench if isinstance(bench, str) else bench.enter(name)
                    if isinstance(contestant, Contestant):
                        results = results._replace(versions=results.versions | dict(contestant.versions))
                    for tokens in options.tokens:
                        progress.update(task, description=f"{name}, {tokens} tokens")
                        if isinstance(bench, str) or isinstance(contestant, str):
                            add(Measurement(name, num_experts, tokens, failure=str(contestant)))
                        else:
                            add(bench.measure(name, contestant, tokens))
                    del contestant  # a peer's copy of the weights
                if options.host and not isinstance(bench, str):
                    results = results._replace(host=(*results.host, *bench.host_times(options.tokens)))
                del layer, bench  # before the next one is allocated
            results = results._replace(complete=True)
        except KeyboardInterrupt:
            pass
    save(results)
    return results


@contextmanager
def _interrupted_when_terminated() -> Iterator[None]:
    """A termination is an interruption: what was measured is not lost when a time limit ends the bench."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _configurations(options: BenchOptions) -> tuple[dict[int | None, Any], str]:
    """Configurations by their number of experts, where that is given, and their name."""
    if options.shapes is None:
        name = options.model or "qwen3-30b-a3b"
        return {None: configuration(name)}, name
    hidden_size, intermediate_size, numbers, topk = options.shapes
    configs: dict[int | None, Any] = {
        num_experts: custom_configuration(hidden_size, intermediate_size, num_experts, topk)
        for num_experts in numbers
    }
    experts = f"{numbers[0]} experts, " if len(numbers) == 1 else ""
    return configs, f"hidden size {hidden_size}, intermediate size {intermediate_size}, {experts}topk {topk}"


def _check(options: BenchOptions) -> None:
    for name, values, accepted in (
        ("--contestants", options.contestants, CONTESTANTS),
        ("--part", (options.part,), PARTS),
    ):
        for value in values:
            if value not in accepted:
                raise Refusal(f"{name} must be of {', '.join(accepted)}, got {value}")
    for tokens in options.tokens:
        if tokens < 1:
            raise Refusal(f"--tokens must be at least 1, got {tokens}")
    alone = [name for name in options.contestants if name in EXPERTS_ONLY]
    if alone and options.part == "block":
        raise Refusal(
            f"--contestants {','.join(alone)}: these compute the experts alone; add --part experts, or leave them out"
        )
    num_experts = options.shapes.num_experts if options.shapes else ()
    if options.plot is not None and len(options.tokens) > 1 and len(num_experts) > 1:
        raise Refusal(
            f"--plot draws over --tokens or over --num-experts, got {len(options.tokens)} and {len(num_experts)} "
            "numbers; give one number of either"
        )
