"""How bench takes times and ceilings."""

from __future__ import annotations

import pytest
import torch

from compile_moe.cli import timing
from compile_moe.cli.bench_results import Measurement, Results, tables


@pytest.fixture(autouse=True)
def short_timing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(timing, "_SECONDS", 0.0)


def test_median_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for each of two calls, but for one slow repetition."""
    seconds = iter([1.0, 9.0, 1.0, 1.0])
    monkeypatch.setattr(timing, "_time", lambda *_: next(seconds))
    done: list[int] = []
    calls = [lambda: done.append(0), lambda: done.append(1)]
    assert timing.seconds_per_call(calls, torch.device("cpu"), False) == 0.5
    assert done == [0, 1]


def test_ceilings() -> None:
    ceilings = timing.measure_ceilings(torch.device("cpu"), torch.float32, ["fp8_w8a8_tensor"])
    assert ceilings.flops > 1e8 and ceilings.bandwidth > 1e8 and not ceilings.scheme_flops


def test_ceilings_of_schemes() -> None:
    """Products of 8 bits for the schemes that quantize tokens."""
    ceilings = timing.Ceilings(1e12, 1e9, {"fp8_w8a8_tensor": 2e12})
    assert ceilings.of("fp8_w8a8_tensor").flops == 2e12
    assert ceilings.of("compile_moe") == ceilings.of("int4_w4a16") == ceilings


def test_floors_of_another_product_are_named() -> None:
    """Where a device can't multiply what a scheme does, its floor is the model's dtype's, and the table says so."""

    def caption(rates: dict[str, float]) -> str:
        measured = tuple(Measurement(name, 8, 1, 1.0) for name in ("fp8_w8a8_tensor", "int4_w4a16"))
        ceilings = timing.Ceilings(1e12, 1e9, rates)
        (table,) = tables(Results("H100", {}, "a model", "experts", "bfloat16", ceilings, measured))
        return str(table.caption)

    assert "floor of fp8_w8a8_tensor by the first one" in caption({})
    assert "by the first one" not in caption({"fp8_w8a8_tensor": 2e12})


@pytest.mark.gpu
def test_ceilings_on_a_gpu() -> None:
    names = ["compile_moe", "fp8_w8a8_tensor", "fp8_w8a8_block", "int8_w8a8_channel", "int8_w8a16"]
    ceilings = timing.measure_ceilings(torch.device("cuda"), torch.bfloat16, names)
    has_float8 = torch.cuda.get_device_capability() >= (8, 9)
    assert set(ceilings.scheme_flops) == {"int8_w8a8_channel", *(names[1:3] if has_float8 else ())}
    assert all(rate > 1e12 for rate in ceilings.scheme_flops.values())
