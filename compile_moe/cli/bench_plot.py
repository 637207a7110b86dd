"""The picture of ``compile-moe bench``: times beside their floor, and the roofline of the run's own ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compile_moe.cli.bench_results import Measurement, Results, title
from compile_moe.cli.contestants import CONTESTANTS
from compile_moe.cli.refusal import Refusal

SUFFIXES = (".png", ".svg")
# Told apart in print and by the colour-blind: after Okabe and Ito.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31", "#555555")
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
_LABEL_DISTANCE = 1.9  # between two labels along the roof, as a ratio
_FLOOR: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def require(path: Path) -> None:
    """Raise Refusal unless a picture can be drawn into a file of this name."""
    if path.suffix not in SUFFIXES:
        raise Refusal(f"--plot must name a file that ends in {' or '.join(SUFFIXES)}, got {path}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise Refusal(
            f"--plot needs matplotlib ({error}); install it by: pip install 'compile-moe[plot]'"
        ) from error


def picture(results: Results) -> Any:
    """A figure: time over tokens, or over experts where their number differs; of the experts alone also the share of
    the floor and the roofline.
    """
    from matplotlib.figure import Figure

    measured = sorted(
        (m for m in results.measurements if m.microseconds is not None),
        key=lambda m: (m.num_experts or 0, m.tokens),
    )
    over_experts = len({m.num_experts for m in results.measurements}) > 1
    with_floor = any(m.floor is not None for m in measured)
    figure = Figure(figsize=(16 if with_floor else 7, 5.6), dpi=150, layout="constrained")
    heading = "\n".join(title(results).split("; "))
    if over_experts:
        heading = f"{results.measurements[0].tokens} tokens, {heading}"
    figure.suptitle(heading, fontsize=10)
    axes = figure.subplots(1, 3 if with_floor else 1, squeeze=False)[0]
    _draw_times(axes[0], measured, over_experts)
    if with_floor:
        _draw_shares(axes[1], measured, over_experts)
        _draw_roofline(axes[2], results, measured, over_experts)
    if not measured:
        axes[0].text(0.5, 0.5, "nothing was measured", ha="center", transform=axes[0].transAxes)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure


def _draw_times(axes: Any, measured: list[Measurement], over_experts: bool) -> None:
    for name, points in _by_contestant(measured):
        x = [_position(m, over_experts) for m in points]
        axes.plot(x, [m.microseconds for m in points], label=name, **_style(name))
    floors: dict[int, float] = {}
    for m in measured:
        if m.floor is not None:  # of quantized weights it is lower
            floors[_position(m, over_experts)] = max(m.floor, floors.get(_position(m, over_experts), 0.0))
    if floors:
        axes.plot(*zip(*sorted(floors.items()), strict=True), label="floor of this run's ceilings", **_FLOOR)
    axes.set(title="Time of a call", ylabel="µs", yscale="log")
    _number_axis(axes, measured, over_experts)
    axes.yaxis.set_major_formatter(_plain)


def _draw_shares(axes: Any, measured: list[Measurement], over_experts: bool) -> None:
    for name, points in _by_contestant(measured):
        x = [_position(m, over_experts) for m in points]
        axes.plot(x, [_share(m) for m in points], **_style(name))
    axes.axhline(1, **_FLOOR)
    axes.set(title="Share of the floor", ylabel="floor / time")
    axes.set_ylim(0, max(1.05, 1.05 * max(map(_share, measured), default=0)))
    _number_axis(axes, measured, over_experts)


def _draw_roofline(axes: Any, results: Results, measured: list[Measurement], over_experts: bool) -> None:
    """Achieved TFLOP/s against FLOPs a byte, under what the copy and the matrix product of this run allow."""
    flops, bandwidth = results.ceilings.flops, results.ceilings.bandwidth
    for name, points in _by_contestant(measured):
        points = sorted(points, key=_intensity)
        achieved = [m.work.flops / m.microseconds / 1e6 for m in points if m.work and m.microseconds]
        axes.plot([_intensity(m) for m in points], achieved, **_style(name))
    numbers = {_intensity(m): _position(m, over_experts) for m in measured}
    ridge = flops / bandwidth
    ends = min(*numbers, ridge) / 2, max(*numbers, ridge) * 2
    axes.plot([ends[0], ridge, ends[1]], [ends[0] * bandwidth / 1e12, flops / 1e12, flops / 1e12], **_FLOOR)
    letter, last = "E" if over_experts else "M", 0.0
    for intensity, number in sorted(numbers.items()):
        if intensity > _LABEL_DISTANCE * last:
            roof = min(flops, intensity * bandwidth) / 1e12
            placed: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points", "rotation": 90}
            axes.annotate(f"{letter} = {number}", (intensity, roof), fontsize=7, ha="center", **placed)
            last = intensity
    axes.set(title="Roofline", xlabel="FLOPs / byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axes.set_ylim(top=5 * flops / 1e12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
    axes.grid(alpha=0.3)


def _number_axis(axes: Any, measured: list[Measurement], over_experts: bool) -> None:
    numbers = sorted({_position(m, over_experts) for m in measured})
    axes.set(xscale="log", xlabel="experts (E)" if over_experts else "tokens (M)")
    axes.set_xticks(numbers, [str(number) for number in numbers], rotation=45 if len(numbers) > 6 else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _by_contestant(measured: list[Measurement]) -> list[tuple[str, list[Measurement]]]:
    points = {name: [m for m in measured if m.contestant == name] for name in CONTESTANTS}
    return [(name, found) for name, found in points.items() if found]


def _position(m: Measurement, over_experts: bool) -> int:
    return (m.num_experts or 0) if over_experts else m.tokens


def _share(m: Measurement) -> float:
    return m.floor / m.microseconds if m.floor and m.microseconds else 0.0


def _intensity(m: Measurement) -> float:
    return m.work.flops / m.work.num_bytes if m.work else 0.0


def _style(name: str) -> dict[str, Any]:
    i = CONTESTANTS.index(name)
    return {
        "color": _COLORS[i % len(_COLORS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": "-" if i < len(_COLORS) else ":",
        "linewidth": 2.4 if i == 0 else 1.4,
        "markersize": 6,
        "zorder": 4 if i == 0 else 3,
    }


def _plain(value: float, _: int) -> str:
    return f"{value:g}"
