"""``compile-moe simulate``: how long a MoE layer would take with its experts on more ranks than there are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from compile_moe.cli.bench_plot import require
from compile_moe.cli.moe_layer import configuration
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.simulate_cost import Kernels, Layer, Links, check_ranks, kernels_of_bench, simulate_layer
from compile_moe.cli.timing import Ceilings
from compile_moe.cli.tune_inputs import Experts, experts_of_model, experts_of_sizes

#: Bytes of an element.
DTYPES = {"bfloat16": 2.0, "float8": 1.0}
EXCHANGES = "all_to_all", "all_gather"
#: What a token's expert id (int32) and weight (float32) take.
SLOT_BYTES = 8


@dataclass(frozen=True)
class SimulateOptions:
    """What the command line gives.

    sizes: K, I, E and topk, in place of a model. tokens: of each rank. Bandwidths in GB/s of a rank in each direction,
    latencies and the overhead in microseconds, matmul in TFLOP/s, copy in TB/s. kernels: a file of bench, in place of
    overhead, share, matmul and copy.
    """

    model: str | None = None
    sizes: tuple[int, int, int, int] | None = None
    ranks: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    tokens: int = 128
    skews: tuple[float, ...] = (0.0, 0.5, 1.0)
    exchange: str = "all_to_all"
    dispatch: str = "bfloat16"
    weights: str = "bfloat16"
    kernels: Path | None = None
    matmul: float = 740.0
    copy: float = 3.0
    overhead: float = 10.0
    share: float = 0.8
    node_size: int = 8
    node_bandwidth: float = 450.0
    network_bandwidth: float = 50.0
    node_latency: float = 10.0
    network_latency: float = 25.0
    plot: Path | None = None
    seed: int = 0


def run_simulate(options: SimulateOptions) -> None:
    """Print the table to stdout.

    Raises:
        Refusal: options that can't work.
    """
    _check(options)
    if options.plot is not None:
        require(options.plot)
    name, experts = named_experts(options.model, options.sizes)
    for num_ranks in options.ranks:
        check_ranks(num_ranks, experts.shape.num_experts)
    kernels = _kernels(options)
    layers = simulate(options, experts, kernels)
    heading = f"{name}, {options.tokens} tokens a rank, {options.exchange} in {options.dispatch}"
    Console(width=None if Console().is_terminal else 110).print(table(heading, options, kernels, layers))
    if options.plot is not None:
        try:
            picture(heading, layers).savefig(options.plot)
        except OSError as error:
            raise Refusal(f"--plot {options.plot} can't be written: {error.strerror}") from error


def simulate(options: SimulateOptions, experts: Experts, kernels: Kernels) -> list[Layer]:
    """For each skew, all numbers of ranks."""
    links = Links(
        options.node_size,
        options.node_bandwidth * 1e9,
        options.network_bandwidth * 1e9,
        options.node_latency * 1e-6,
        options.network_latency * 1e-6,
    )
    hidden_size = experts.shape.hidden_size
    # float8 has a float32 scale for 128 columns, as in DeepSeek's checkpoints.
    scales = 4 * -(-hidden_size // 128) if options.dispatch == "float8" else 0
    dispatched = hidden_size * DTYPES[options.dispatch] + scales + experts.topk * SLOT_BYTES
    return [
        simulate_layer(
            experts,
            num_ranks,
            options.tokens,
            skew,
            kernels,
            links,
            dispatched,
            hidden_size * DTYPES["bfloat16"],
            DTYPES[options.weights],
            options.seed,
            options.exchange,
        )
        for skew in options.skews
        for num_ranks in options.ranks
    ]


def table(heading: str, options: SimulateOptions, kernels: Kernels, layers: list[Layer]) -> Table:
    origin = f"from {options.kernels}" if options.kernels else "given, not measured"
    result = Table(
        title=Text(f"Simulated: {heading}"),
        caption=Text(
            f"µs of the slowest rank in each part, one after the other. Kernels {origin}: overhead "
            f"{kernels.overhead * 1e6:.1f} µs, {kernels.ceilings.flops / 1e12:.0f} TFLOP/s, "
            f"{kernels.ceilings.bandwidth / 1e12:.2f} TB/s. Links given: nodes of {options.node_size} with "
            f"{options.node_bandwidth:g} GB/s and {options.node_latency:g} µs, {options.network_bandwidth:g} GB/s and "
            f"{options.network_latency:g} µs between them."
        ),
    )
    for column in (
        "skew",
        "ranks",
        "busiest / mean",
        "dispatch",
        "experts",
        "combine",
        "layer µs",
        "in links",
    ):
        result.add_column(column, justify="right")
    for each in layers:
        parts = (f"{part * 1e6:.1f}" for part in (each.dispatch, each.experts, each.combine, each.seconds))
        in_links = 1 - each.experts / each.seconds
        result.add_row(
            f"{each.skew:g}", str(each.num_ranks), f"{each.imbalance:.2f}", *parts, f"{in_links:.0%}"
        )
    return result


def picture(heading: str, layers: list[Layer]) -> Any:
    """A figure: time of a layer over ranks for each skew, and its parts without skew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), dpi=150, layout="constrained")
    figure.suptitle(f"Simulated: {heading}", fontsize=10)
    whole, parts = figure.subplots(1, 2)
    skews = tuple(dict.fromkeys(each.skew for each in layers))
    for skew in skews:
        points = [each for each in layers if each.skew == skew]
        whole.plot(
            [p.num_ranks for p in points],
            [p.seconds * 1e6 for p in points],
            marker="o",
            label=f"skew {skew:g}",
        )
    points = [each for each in layers if each.skew == skews[0]]
    positions = range(len(points))
    bottom = [0.0] * len(points)
    for part in ("dispatch", "experts", "combine"):
        heights = [getattr(p, part) * 1e6 for p in points]
        parts.bar(positions, heights, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    ranks = [str(p.num_ranks) for p in points]
    parts.set_xticks(positions, ranks)
    parts.set(title=f"Parts, skew {skews[0]:g}", xlabel="ranks", ylabel="µs")
    whole.set_xscale("log", base=2)
    whole.set_xticks([p.num_ranks for p in points], ranks)
    whole.set(title="A layer", xlabel="ranks", ylabel="µs", ylim=(0, None))
    for axes in (whole, parts):
        axes.legend()
    return figure


def named_experts(model: str | None, sizes: tuple[int, int, int, int] | None) -> tuple[str, Experts]:
    """A name and the experts of ``sizes`` K, I, E and topk, or else of a model."""
    if sizes is not None:
        hidden_size, intermediate_size, num_experts, topk = sizes
        name = f"hidden size {hidden_size}, intermediate size {intermediate_size}, {num_experts} experts, topk {topk}"
        return name, experts_of_sizes(*sizes)
    name = model or "qwen3-30b-a3b"
    return name, experts_of_model(configuration(name))


def _kernels(options: SimulateOptions) -> Kernels:
    if options.kernels is not None:
        return kernels_of_bench(options.kernels)
    ceilings = Ceilings(options.matmul * 1e12, options.copy * 1e12)
    return Kernels(ceilings, options.overhead * 1e-6, ((1.0, options.share),))


def _check(options: SimulateOptions) -> None:
    for option, value in (("--tokens", options.tokens), ("--node-size", options.node_size)):
        if value < 1:
            raise Refusal(f"{option} must be at least 1, got {value}")
    for option, number in (
        ("--matmul", options.matmul),
        ("--copy", options.copy),
        ("--share", options.share),
        ("--node-bandwidth", options.node_bandwidth),
        ("--network-bandwidth", options.network_bandwidth),
    ):
        if not number > 0:
            raise Refusal(f"{option} must be positive, got {number:g}")
    for option, number in (
        ("--overhead", options.overhead),
        ("--node-latency", options.node_latency),
        ("--network-latency", options.network_latency),
        *(("--skew", skew) for skew in options.skews),
    ):
        if not number >= 0:
            raise Refusal(f"{option} must not be negative, got {number:g}")
    for option, dtype in (("--dispatch", options.dispatch), ("--weights", options.weights)):
        if dtype not in DTYPES:
            raise Refusal(f"{option} must be of {', '.join(DTYPES)}, got {dtype}")
    if options.exchange not in EXCHANGES:
        raise Refusal(f"--exchange must be of {', '.join(EXCHANGES)}, got {options.exchange}")
