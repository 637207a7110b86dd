"""How long calls take on a device, and how fast that device is at best."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from compile_moe.quantization import SCHEMES

Call = Callable[[], Any]

_SECONDS = 0.25  # of measuring, at least, where that takes fewer than _MOST_REPETITIONS
_MOST_REPETITIONS = 50


class Ceilings(NamedTuple):
    """What a device reached: matrix products in FLOP/s, copies in bytes/s, read and written.

    scheme_flops: of products of quantized tokens and weights, by the scheme's name.
    """

    flops: float
    bandwidth: float
    scheme_flops: dict[str, float] = {}  # noqa: RUF012

    def of(self, contestant: str) -> Ceilings:
        """Those of a contestant: of a scheme, with its rate of products."""
        return self._replace(flops=self.scheme_flops.get(contestant, self.flops))


def capture(calls: Sequence[Call]) -> Call:
    """One CUDA graph of all calls, one after the other; they must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def seconds_per_call(
    calls: Sequence[Call], device: torch.device, as_graph: bool, warm: bool = False
) -> float:
    """Median seconds of one of ``calls``, which run one after the other; several, so that no cache holds their data.

    Args:
        as_graph: replay them as a CUDA graph; otherwise the host launches them.
        warm: run them for a while before: a GPU lowers its clocks within a tenth of a second when it reaches its
            limit of power.
    """
    for call in calls:
        call()
    if as_graph:
        replay = capture(calls)
        replay()
        return _median(replay, device, warm) / len(calls)

    def run() -> None:
        for call in calls:
            call()

    return _median(run, device, warm) / len(calls)


def host_seconds(call: Call, device: torch.device) -> float:
    """Median seconds until ``call`` returns, on a GPU that has nothing else to do."""
    seconds = []
    for _ in range(_MOST_REPETITIONS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_ceilings(device: torch.device, dtype: torch.dtype, contestants: Iterable[str] = ()) -> Ceilings:
    """Of square matrix products and of a copy, too large for caches, on a warm device.

    Args:
        contestants: of the schemes among them that quantize tokens, on a GPU, the products of such operands are
            measured, too: cuBLAS's, with a scale each row and column, or for all where the scheme has one.
    """
    on_gpu = device.type == "cuda"
    n = 8192 if on_gpu else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = _product_rate(lambda: torch.mm(a, b), n, device)
    source = torch.empty(2**30 if on_gpu else 2**26, device=device, dtype=torch.uint8).zero_()
    target = torch.empty_like(source)
    seconds = seconds_per_call([lambda: target.copy_(source)], device, False, warm=True)
    rates = {}
    for name in contestants:
        product = _scheme_product(name, n, device) if on_gpu else None
        if product is not None:
            with contextlib.suppress(RuntimeError):  # what this device or torch can't multiply
                rates[name] = _product_rate(product, n, device)
    return Ceilings(flops, 2 * source.numel() / seconds, rates)


def _product_rate(product: Call, n: int, device: torch.device) -> float:
    calls = [product] * (8 if device.type == "cuda" else 1)
    return 2 * n**3 / seconds_per_call(calls, device, False, warm=True)


def quantizes_tokens(contestant: str) -> bool:
    """Whether it is a scheme that multiplies quantized tokens."""
    return contestant in SCHEMES and SCHEMES[contestant]().token_scaling is not None


def _scheme_product(name: str, n: int, device: torch.device) -> Call | None:
    """cuBLAS's product of (n, n) operands as a scheme quantizes them; None where it leaves tokens as they are."""
    scaling = SCHEMES[name]().token_scaling if quantizes_tokens(name) else None
    if scaling is None:
        return None
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if scaling.dtype is torch.int8:
        a8, b8 = ((t * 30).clamp(-127, 127).to(torch.int8) for t in (a, b))
        return lambda: torch._int_mm(a8, b8.t())
    if torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a8, b8 = a.to(scaling.dtype), b.to(scaling.dtype)
    rows = 1 if scaling.per == "tensor" else n
    scales = torch.ones(rows, 1, device=device), torch.ones(1, rows, device=device)
    return lambda: torch._scaled_mm(a8, b8.t(), *scales, out_dtype=torch.bfloat16)


def _median(call: Call, device: torch.device, warm: bool) -> float:
    seconds: list[float] = []
    start = time.perf_counter()
    while warm and device.type == "cuda" and time.perf_counter() - start < _SECONDS:
        _time(call, device)
    start = time.perf_counter()
    while len(seconds) < 3 or (len(seconds) < _MOST_REPETITIONS and time.perf_counter() - start < _SECONDS):
        seconds.append(_time(call, device))
    return statistics.median(seconds)


def _time(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
    return before.elapsed_time(after) / 1e3
