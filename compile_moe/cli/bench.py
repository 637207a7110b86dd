"""``compile-moe bench``: a MoE layer with our experts and with those of transformers, timed side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli import kernel_count
from compile_moe.cli.language_model import choose_device, choose_dtype, one_line
from compile_moe.cli.moe_layer import MoELayer, configuration, experts_of, make_layer
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.timing import Ceilings, host_seconds, measure_ceilings, seconds_per_call

CONTESTANTS = (integration.NAME, "grouped_mm", "batched_mm", "eager")
PARTS = ("block", "experts")
#: Inputs of each number of tokens, with other routing, so that the weights don't stay in the cache.
_NUM_INPUTS = 8
#: Largest error that a contestant may have against transformers' eager experts, relative, in the L2 norm of a token.
_MOST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class BenchOptions:
    """What the command line gives; None leaves the choice to the bench."""

    model: str = "qwen3-30b-a3b"
    tokens: tuple[int, ...] = (1, 16, 64, 1024)
    part: str = "block"
    contestants: tuple[str, ...] = CONTESTANTS[:2]
    device: str | None = None
    dtype: str | None = None
    json: Path | None = None
    seed: int = 0


class Measurement(NamedTuple):
    """One contestant at one number of tokens.

    microseconds: of one call; compiled ones on a GPU are replayed as a CUDA graph. host: microseconds until a call
    that is not replayed returns. kernels: of one call, by name. memory: bytes allocated at the peak beyond weights and
    input. error: relative, against transformers' eager experts. floor: of the time, by the ceilings of
    this run, in microseconds; None for a block. failure: why there are no numbers, or "". What only a GPU has is None
    on a CPU.
    """

    contestant: str
    tokens: int
    microseconds: float | None = None
    host: float | None = None
    kernels: tuple[str, ...] | None = None
    memory: int | None = None
    error: float | None = None
    floor: float | None = None
    failure: str = ""


class Results(NamedTuple):
    """All measurements of a run, and where they were taken."""

    device: str
    versions: dict[str, str]
    model: str
    part: str
    dtype: str
    ceilings: Ceilings
    measurements: tuple[Measurement, ...]


def run_bench(options: BenchOptions) -> None:
    """Measure, print the table to stdout and the progress to stderr.

    Raises:
        Refusal: options that can't work here.
    """
    _check(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = configuration(options.model)
    if options.json is not None:
        _write(options.json, "", "a")  # before the work is done
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs capture the current one
    with torch.no_grad():
        layer = make_layer(config, "eager", device, dtype, options.seed)
        results = measure(layer, options, device, dtype)
    if options.json is not None:
        _write(options.json, json.dumps(_as_json(results), indent=1) + "\n", "w")
    out = Console() if Console().is_terminal else Console(width=110)
    out.print(_table(results))


def measure(layer: MoELayer, options: BenchOptions, device: torch.device, dtype: torch.dtype) -> Results:
    """All contestants at all numbers of tokens."""
    import transformers
    import triton

    ceilings = measure_ceilings(device, dtype)
    measurements: list[Measurement] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(options.contestants) * len(options.tokens))
        for contestant in options.contestants:
            torch._dynamo.reset()
            run = _Contestant(layer, contestant, options.part)
            for tokens in options.tokens:
                progress.update(task, description=f"{contestant}, {tokens} tokens")
                measurements.append(run.measure(tokens, device, dtype, ceilings))
                progress.advance(task)
    versions = {module.__name__: module.__version__ for module in (torch, triton, transformers)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Results(
        name,
        versions,
        options.model,
        options.part,
        str(dtype).removeprefix("torch."),
        ceilings,
        tuple(measurements),
    )


class _Contestant:
    """A layer whose experts are those called ``name``; compiled, unless they are eager."""

    def __init__(self, layer: MoELayer, name: str, part: str) -> None:
        self.layer = layer
        self.experts = experts_of(layer)
        self.name = name
        self.is_block = part == "block"
        self.module: nn.Module = layer if self.is_block else self.experts
        self.call: Callable[..., Any] = (
            self.module if name == "eager" else torch.compile(self.module, fullgraph=True)
        )

    def measure(
        self, tokens: int, device: torch.device, dtype: torch.dtype, ceilings: Ceilings
    ) -> Measurement:
        try:
            return self._measure(tokens, device, dtype, ceilings)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Measurement(self.name, tokens, failure="out of memory")
        except Exception as error:  # what transformers or the compiler can't do for this contestant
            return Measurement(self.name, tokens, failure=f"{type(error).__name__}: {one_line(error)[:200]}")

    def _measure(
        self, tokens: int, device: torch.device, dtype: torch.dtype, ceilings: Ceilings
    ) -> Measurement:
        inputs = [self._inputs(tokens, device, dtype, seed) for seed in range(_NUM_INPUTS)]
        error = self._error(inputs)
        if not error <= _MOST_ERROR[dtype]:
            return Measurement(self.name, tokens, error=error, failure=f"wrong result, by {error:.1e}")
        calls = [lambda arguments=arguments: self.call(*arguments) for arguments in map(self._own, inputs)]
        calls[0]()
        memory = _peak(calls[0], device)
        kernels = tuple(kernel_count.gpu_kernels(calls[0], device)) if device.type == "cuda" else None
        host = host_seconds(calls[0], device) * 1e6 if device.type == "cuda" else None
        # Eager experts read on the host which expert has tokens.
        as_graph = device.type == "cuda" and self.name != "eager"
        seconds = seconds_per_call(calls, device, as_graph)
        floor = None if self.is_block else _floor(self.experts, inputs, ceilings)
        return Measurement(self.name, tokens, seconds * 1e6, host, kernels, memory, error, floor)

    def _inputs(
        self, tokens: int, device: torch.device, dtype: torch.dtype, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states (M, K), and random routing: ids and weights (M, topk)."""
        generator = torch.Generator(device).manual_seed(1000 + seed)
        random: dict[str, Any] = {"device": device, "generator": generator}
        num_experts, hidden_size = self.experts.down_proj.size(0), self.layer.norm.normalized_shape[0]
        topk = self.experts.config.num_experts_per_tok
        hidden_states = torch.randn(tokens, hidden_size, dtype=dtype, **random)
        ids = torch.rand(tokens, num_experts, **random).topk(topk).indices
        weights = torch.rand(tokens, topk, **random)
        return hidden_states, ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)

    def _own(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Sequence[Tensor]:
        """What this contestant's module takes; one compile serves all numbers of tokens but one."""
        arguments = inputs[:1] if self.is_block else inputs
        if inputs[0].size(0) > 1:
            for argument in arguments:
                torch._dynamo.mark_dynamic(argument, 0)
        return arguments

    def _error(self, inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
        """Relative error of what is timed against eager experts: the median of the tokens, of which a block may route
        some to other experts where two are about as good.
        """
        self._use("eager")
        expected = self._added([self.module(*self._own(i)) for i in inputs], inputs)
        self._use(self.name)
        result = self._added([self.call(*self._own(i)) for i in inputs], inputs)
        return float(((result - expected).norm(dim=-1) / expected.norm(dim=-1)).median())

    def _added(self, results: list[Any], inputs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """What the experts added to all tokens, float32."""
        if self.is_block:
            results = [result[0].float() - i[0].float() for result, i in zip(results, inputs, strict=True)]
        return torch.cat([result.float() for result in results])

    def _use(self, experts: str) -> None:
        self.experts.config._experts_implementation = experts


def _floor(experts: nn.Module, inputs: Sequence[tuple[Tensor, Tensor, Tensor]], ceilings: Ceilings) -> float:
    """Microseconds that the arithmetic or the bytes need: weights of the experts that are hit, tokens in and out."""
    (hidden_states, ids, _), weights = inputs[0], [p for p in experts.parameters() if p.dim() == 3]
    elements = sum(p[0].numel() for p in weights)
    hit = sum(float(i.unique().numel()) for _, i, _ in inputs) / len(inputs)
    num_bytes = (hit * elements + 2 * hidden_states.numel()) * hidden_states.element_size()
    return max(2 * ids.numel() * elements / ceilings.flops, num_bytes / ceilings.bandwidth) * 1e6


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


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


def _write(path: Path, text: str, mode: str) -> None:
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise Refusal(f"--json {path} can't be written: {error.strerror}") from error


def _as_json(results: Results) -> dict[str, Any]:
    return {
        **results._asdict(),
        "ceilings": results.ceilings._asdict(),
        "measurements": [m._asdict() for m in results.measurements],
    }


def _rows(results: Results) -> Iterator[tuple[str, ...]]:
    first = {m.tokens: m.microseconds for m in results.measurements if m.contestant == integration.NAME}
    for m in sorted(results.measurements, key=lambda m: m.tokens):
        if m.microseconds is None:
            yield str(m.tokens), m.contestant, m.failure, "", "", "", "", ""
            continue
        ours = first.get(m.tokens)
        yield (
            str(m.tokens),
            m.contestant,
            f"{m.microseconds:.1f}",
            "" if ours is None else f"{m.microseconds / ours:.2f}",
            "" if m.floor is None else f"{m.floor / m.microseconds:.2f}",
            "" if m.host is None else f"{m.host:.0f}",
            "" if m.kernels is None else str(len(m.kernels)),
            "" if m.memory is None else f"{m.memory / 2**20:.1f}",
        )


def _table(results: Results) -> Table:
    flops, bandwidth = results.ceilings
    table = Table(
        # As text: a folder's name may hold what rich takes for markup.
        title=Text(
            f"{results.model}, {results.part}, {results.dtype}; {results.device}, "
            + ", ".join(f"{name} {version}" for name, version in results.versions.items())
        ),
        caption=f"In the same run: matrix product {flops / 1e12:.1f} TFLOP/s, copy {bandwidth / 1e12:.3f} TB/s.",
    )
    columns = ("tokens", "experts", "µs", "times ours", "floor / time", "host µs", "kernels", "MiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "experts" else "right")
    for row in _rows(results):
        table.add_row(*row)
    return table
