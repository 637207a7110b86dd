"""``compile-moe tune``: time the GEMMs of a layer with many tiles, and keep the best ones for later runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from compile_moe.cli.language_model import choose_device, choose_dtype
from compile_moe.cli.moe_layer import configuration
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.tune_inputs import (
    GEMMS,
    NUM_ROUTINGS,
    Experts,
    experts_of_model,
    experts_of_sizes,
    make_gemms,
    make_weights,
)
from compile_moe.cli.tune_journal import Journal
from compile_moe.cli.tune_search import DeviceCase, Found, Timer, search, time_on_device
from compile_moe.ops.tuning import Tile, device_name, store, tiles_folder


@dataclass(frozen=True)
class TuneOptions:
    """What the command line gives; None leaves the choice to the command.

    sizes: hidden size, intermediate size, experts, topk. skew: of the second kind of routing; the first is even.
    exhaustive: measure every tile. output: folder for the results.
    """

    model: str | None = None
    sizes: tuple[int, int, int, int] | None = None
    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    dtype: str | None = None
    device: str | None = None
    skew: float = 0.5
    exhaustive: bool = False
    output: Path | None = None


def run_tune(options: TuneOptions) -> None:
    """Measure, store, print the table to stdout and the progress to stderr.

    Raises:
        Refusal: options that can't work here.
    """
    for tokens in options.tokens:
        if tokens < 1:
            raise Refusal(f"--tokens must be at least 1, got {tokens}")
    if not 0 <= options.skew < float("inf"):
        raise Refusal(f"--skew must be at least 0 (all experts as likely) and finite, got {options.skew}")
    device = choose_device(options.device)
    if device.type != "cuda":
        given = (
            "got --device cpu" if options.device else f"torch {torch.__version__} sees no CUDA device here"
        )
        raise Refusal(
            f"tune times kernels on a CUDA device, but {given}; run it on the machine whose tiles you want"
        )
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    dtype = choose_dtype(options.dtype, device)
    if options.sizes is not None:
        name, experts = "own sizes", experts_of_sizes(*options.sizes)
    else:
        name = options.model or "qwen3-30b-a3b"
        experts = experts_of_model(configuration(name))
    folder = options.output or tiles_folder()
    if folder is None:
        raise Refusal(
            "there is no folder for results: COMPILE_MOE_TILES is empty, or this user has no home; give one with "
            "--output"
        )
    torch.cuda.set_device(device)  # graphs capture the current one
    with torch.no_grad():
        found, path = tune(experts, options, folder, dtype, device)
    out = Console() if Console().is_terminal else Console(width=150)
    out.print(_table(f"{name}, {options.dtype or dtype}; {device_name(device.index)}", experts, found))
    out.print(Text(f"Stored in {path}"), soft_wrap=True)
    if options.output is not None:
        out.print(Text(f"Used where COMPILE_MOE_TILES={folder}"), soft_wrap=True)


def tune(
    experts: Experts,
    options: TuneOptions,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = time_on_device,
) -> tuple[list[Found], Path]:
    """Both GEMMs at all numbers of tokens. Each result is stored as soon as it is there; an interrupted run goes on
    where it was.

    Raises:
        Refusal: results can't be written, or the device has too little memory.
    """
    try:
        path = store(folder, device, experts.shape, {})  # before the work is done
        with closing(Journal(_journal_path(path, experts, options.skew, dtype))) as journal:
            found = []
            for best in _search_all(experts, options, dtype, device, timer, journal):
                found.append(best)
                store(folder, device, experts.shape, {best.problem: {best.num_slots: best.tile}})
        journal.remove()
    except OSError as error:
        raise Refusal(
            f"results go to {folder}, which must be a folder that can be written: {error.filename}: {error.strerror}"
        ) from error
    except torch.OutOfMemoryError as error:
        raise Refusal(
            f"{device} has too little memory for {experts.shape} with {max(options.tokens)} tokens in {dtype}; give "
            "fewer --tokens"
        ) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. The same command goes on from here.")
        raise
    return found, path


def _search_all(
    experts: Experts,
    options: TuneOptions,
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer,
    journal: Journal,
) -> Iterator[Found]:
    with _progress() as progress:
        if len(journal):
            progress.console.print(f"Going on: {len(journal)} measurements are there")
        task = progress.add_task("")
        for gemm in GEMMS:
            weights = make_weights(experts, gemm, dtype, device)
            for tokens in options.tokens:
                case = DeviceCase(make_gemms(experts, gemm, weights, tokens, (0.0, options.skew)), timer)

                def report(what: str, done: int, total: int, where: str = f"{gemm}, {tokens} tokens") -> None:
                    progress.update(task, description=f"{where}: {what}", completed=done, total=total)

                yield search(case, journal, report, options.exhaustive)
                del case  # before the next one takes memory
            del weights


def _journal_path(path: Path, experts: Experts, skew: float, dtype: torch.dtype) -> Path:
    """One for each set of measurements that can be compared."""
    digest = hashlib.sha256(repr((experts, skew, NUM_ROUTINGS, dtype)).encode()).hexdigest()[:8]
    return path.with_name(f"{path.stem}-{digest}.journal.jsonl")


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _table(title: str, experts: Experts, found: list[Found]) -> Table:
    failed = sum(each.num_failed for each in found)
    table = Table(
        # As text: a folder's name may hold what rich takes for markup.
        title=Text(f"{title}, torch {torch.__version__}"),
        caption=Text(
            "Means over even and skewed routing. "
            + (f"{failed} measurements failed and were left out." if failed else "No measurement failed.")
        ),
    )
    for column in ("tokens", "GEMM", "heuristic tile", "µs", "tuned tile", "µs", "ratio"):
        table.add_column(column, justify="left" if "tile" in column or column == "GEMM" else "right")
    for each in sorted(found, key=lambda each: (each.num_slots, each.problem.gemm)):
        table.add_row(
            str(each.num_slots // experts.topk),
            each.problem.gemm,
            _describe(each.heuristic_tile),
            f"{each.heuristic_seconds * 1e6:.1f}",
            "the same" if each.tile == each.heuristic_tile else _describe(each.tile),
            f"{each.seconds * 1e6:.1f}",
            f"{each.heuristic_seconds / each.seconds:.2f}",
        )
    return table


def _describe(tile: Tile) -> str:
    """Rows x columns x depth, and what else a tile has."""
    rest = [
        name if value is True else f"{name} {value}"
        for name, value in tile._asdict().items()
        if not name.startswith("block_") and value != tile._field_defaults.get(name)
    ]
    return ", ".join([f"{tile.block_m}x{tile.block_n}x{tile.block_k}", *rest])
