"""``compile-moe bench --plot``: what the picture shows, and that it is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compile_moe.cli import app, bench, bench_plot, timing
from compile_moe.cli.bench_results import Measurement, Results, Work
from compile_moe.cli.contestants import CONTESTANTS
from compile_moe.cli.timing import Ceilings

pytest.importorskip("matplotlib")

CEILINGS = Ceilings(100e12, 1e12)  # the ridge is at 100 FLOPs a byte


def measured(name: str, num_experts: int, tokens: int, share: float) -> Measurement:
    """A contestant at a share of the floor; 1 FLOP a byte for each token, of each of 10⁶ bytes an expert."""
    work = Work(tokens * num_experts * 10**6, num_experts * 1e6)
    floor = work.floor(CEILINGS)
    return Measurement(name, num_experts, tokens, floor / share, work=work, floor=floor)


def results(*measurements: Measurement) -> Results:
    return Results("H100", {"torch": "2.11"}, "a model", "experts", "bfloat16", CEILINGS, measurements)


def series(axes: Any, label: str) -> dict[float, float]:
    (line,) = (line for line in axes.get_lines() if line.get_label() == label)
    return dict(line.get_xydata().tolist())


def test_times_and_floor_over_tokens() -> None:
    tokens = (1, 1000, 10)
    figure = bench_plot.picture(
        results(
            *(
                measured(name, 8, m, share)
                for name, share in (("compile_moe", 0.8), ("vllm", 0.5))
                for m in tokens
            )
        )
    )
    times, shares, roofline = figure.axes
    assert (times.get_xscale(), times.get_yscale(), times.get_ylabel()) == ("log", "log", "µs")
    assert times.get_xlabel() == shares.get_xlabel() == "tokens (M)"
    assert [label.get_text() for label in times.get_xticklabels()] == ["1", "10", "1000"]
    # 8 MB take 8 µs; from 100 tokens on the arithmetic takes longer.
    assert series(times, "floor of this run's ceilings") == pytest.approx({1: 8, 10: 8, 1000: 80})
    assert series(times, "compile_moe") == pytest.approx({1: 10, 10: 10, 1000: 100})
    assert series(times, "vllm") == pytest.approx({1: 16, 10: 16, 1000: 160})
    ours, vllm, one = (line.get_ydata() for line in shares.get_lines())
    assert (list(ours), list(vllm), list(one)) == (
        pytest.approx([0.8] * 3),
        pytest.approx([0.5] * 3),
        pytest.approx([1] * 2),
    )
    # Achieved TFLOP/s over FLOPs a byte, and the roof: the copy's line up to the ridge, then flat.
    ours, _, roof = (dict(line.get_xydata().tolist()) for line in roofline.get_lines())
    assert ours == pytest.approx({1: 0.8, 10: 8, 1000: 80})
    assert roof == pytest.approx({0.5: 0.5, 100: 100, 2000: 100})
    assert [text.get_text() for text in roofline.texts] == ["M = 1", "M = 10", "M = 1000"]


def test_over_experts() -> None:
    figure = bench_plot.picture(results(*(measured("compile_moe", e, 4, 0.5) for e in (64, 8))))
    times = figure.axes[0]
    assert times.get_xlabel() == "experts (E)"
    assert series(times, "floor of this run's ceilings") == pytest.approx({8: 8, 64: 64})
    assert series(times, "compile_moe") == pytest.approx({8: 16, 64: 128})
    assert figure.get_suptitle() == "4 tokens, a model, experts, bfloat16\nH100, torch 2.11"
    # Both have the same intensity: one label is enough.
    assert len(figure.axes[2].texts) == 1


def test_legend_covers_nothing() -> None:
    figure = bench_plot.picture(
        results(*(measured(name, 8, 2**i, 0.5) for name in CONTESTANTS for i in range(17)))
    )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*CONTESTANTS, "floor of this run's ceilings"]
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    for axes in figure.axes:
        assert not box.overlaps(axes.get_tightbbox())
    lines = figure.axes[0].get_lines()
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(CONTESTANTS) + 1


def test_a_block_has_no_floor() -> None:
    block = Measurement("compile_moe", 8, 4, 10.0), Measurement("eager", 8, 4, failure="out of memory")
    (times,) = bench_plot.picture(results(*block)).axes
    assert [line.get_label() for line in times.get_lines()] == ["compile_moe"]


def test_nothing_measured() -> None:
    (axes,) = bench_plot.picture(results(Measurement("vllm", 8, 4, failure="not installed"))).axes
    assert [text.get_text() for text in axes.texts] == ["nothing was measured"]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, start: bytes) -> None:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: CEILINGS)
    file = tmp_path / f"times.{suffix}"
    shape = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "4", "--topk", "2"]
    options = ["--part", "experts", "--tokens", "1,2", "--contestants", "eager", "--device", "cpu"]
    result = CliRunner().invoke(app, ["bench", *shape, *options, "--plot", str(file)])
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(start)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    file = tmp_path / "times.png"
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", "--plot", str(file)])
    assert result.exit_code == 2
    assert "install it by: pip install 'compile-moe[plot]'" in result.output
    assert not file.exists()
