"""``compile-moe tune`` without a GPU: the search, its journal, what is stored and printed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from compile_moe.cli import tune, tune_search
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.tune import TuneOptions
from compile_moe.cli.tune_inputs import Experts
from compile_moe.cli.tune_search import DeviceCase, Found
from compile_moe.ops.kernels import tile_file, tile_space
from compile_moe.ops.kernels.tiles import device_limits
from compile_moe.ops.tuning import Gemm, Shape, Tile
from tests.support.command import tune_command as invoke
from tests.support.simulated_gpu import simulated_gpu
from tests.support.tuned_device import NAME, tuned_device

CPU = torch.device("cpu")
EXPERTS = Experts(Shape(4, 64, 32), topk=2)
OPTIONS = TuneOptions(tokens=(1, 20))
CHOICES = {
    "block_m": (16, 32, 64, 128),
    "block_n": (32, 64),
    "block_k": (32, 128),
    "num_stages": (2, 4, 6),
    "num_warps": (4,),
    "swapped": (False, True),
}
Timed = tuple[str, int, Tile]


class WithoutKernels(DeviceCase):
    """All tiles compile and give the same."""

    def compile(self, tiles: Sequence[Tile]) -> None:
        pass

    def _result(self, gemm: Gemm, tile: Tile) -> torch.Tensor:
        return torch.ones(3)


class Timer:
    """Tiles are the faster, the deeper; two kinds of routing differ by a factor."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.timed: list[Timed] = []
        self.stop_after = stop_after

    def __call__(self, gemms: Sequence[Gemm], tile: Tile) -> float:
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        self.timed.append((gemms[0].problem.gemm, gemms[0].num_slots, tile))
        return seconds(tile) * (1 + len(self.timed) % 2)


def seconds(tile: Tile) -> float:
    return 1e-6 * (
        1000 - tile.block_k - 10 * tile.num_stages + tile.block_m / 100 + tile.block_n / 1000 + tile.swapped
    )


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(tile_space, "_CHOICES", CHOICES)
    monkeypatch.setattr(tune, "DeviceCase", WithoutKernels)
    with tuned_device(tmp_path):
        yield


def run(folder: Path, timer: Any, options: TuneOptions = OPTIONS) -> tuple[list[Found], Path]:
    return tune.tune(EXPERTS, options, folder, torch.bfloat16, CPU, timer)


def tiles_in(path: Path) -> dict[tuple[str, int], Tile]:
    tuned = tile_file.parse(path.read_text(), NAME, EXPERTS.shape, device_limits(None))
    return {(problem.gemm, slots): tile for problem, tiles in tuned.items() for slots, tile in tiles.items()}


def test_the_fastest_is_found_and_stored(tmp_path: Path) -> None:
    timer = Timer()
    found, path = run(tmp_path, timer)
    assert [(each.problem.gemm, each.num_slots) for each in found] == [
        ("gather_gemm", 2),
        ("gather_gemm", 40),
        ("scatter_gemm", 2),
        ("scatter_gemm", 40),
    ]
    for each in found:
        measured = {
            tile for gemm, slots, tile in timer.timed if (gemm, slots) == (each.problem.gemm, each.num_slots)
        }
        assert len(measured) > 5 and each.heuristic_tile in measured
        assert each.tile == min(measured, key=seconds)
        assert each.tile.block_k == 128 and each.num_failed == 0
        assert each.seconds == pytest.approx(1.5 * seconds(each.tile))
        assert each.heuristic_seconds == pytest.approx(1.5 * seconds(each.heuristic_tile))
    assert tiles_in(path) == {(each.problem.gemm, each.num_slots): each.tile for each in found}
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".lock"], "the journal is done with"


def test_every_tile_if_asked(tmp_path: Path) -> None:
    few, every = Timer(), Timer()
    found, _ = run(tmp_path, few)
    found_of_all, _ = run(tmp_path, every, TuneOptions(tokens=(1, 20), exhaustive=True))
    assert [each.tile for each in found] == [each.tile for each in found_of_all]
    assert set(few.timed) < set(every.timed)


@pytest.mark.parametrize("exhaustive", [False, True])
def test_an_interrupted_run_goes_on(
    exhaustive: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = TuneOptions(tokens=(1, 20), exhaustive=exhaustive)
    whole = Timer()
    expected, _ = run(tmp_path / "whole", whole, options)
    first = Timer(stop_after=len(whole.timed) // 2 + 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", first, options)
    assert "The same command goes on from here" in capfd.readouterr().err
    (path,) = (tmp_path / "parts").glob("*.json")
    assert tiles_in(path), "what was done is stored"
    (journal,) = (tmp_path / "parts").glob("*.journal.jsonl")
    with journal.open("a") as file:
        file.write('{"gemm": "gather_gemm", "slo')  # as where the power fails
    second = Timer()
    found, path = run(tmp_path / "parts", second, options)
    assert "measurements are there" in capfd.readouterr().err
    assert [each.tile for each in found] == [each.tile for each in expected]
    assert tiles_in(path) == {(each.problem.gemm, each.num_slots): each.tile for each in expected}
    # Measured twice: finalists, and the tile that was under way.
    both = set(first.timed) & set(second.timed)
    assert len(both) <= (1 + tune_search._FINALISTS) * len(found) + 1
    assert len(set(first.timed) - both) > (20 if exhaustive else 5)
    assert set(first.timed) | set(second.timed) == set(whole.timed)


def test_other_routing_is_measured_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Timer(stop_after=21))
    timer = Timer()
    run(tmp_path, timer, TuneOptions(tokens=(1, 20), skew=1.0))
    whole = Timer()
    run(tmp_path / "whole", whole)
    assert timer.timed == whole.timed
    assert list(tmp_path.glob("*.journal.jsonl")), "the other run can still go on"


def test_what_fails_is_skipped_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        if tile.num_stages == 6 and not tile.swapped:
            raise RuntimeError("out of resource: shared memory")
        return seconds(tile)

    found, _ = run(tmp_path, timer)
    for each in found:
        assert each.num_failed > 0 and (each.tile.num_stages < 6 or each.tile.swapped)
    Console(width=150).print(tune._table("a model", EXPERTS, found))
    printed = capfd.readouterr().out
    assert f"{sum(each.num_failed for each in found)} measurements failed" in " ".join(printed.split())


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(self: Any, gemm: Gemm, tile: Tile) -> torch.Tensor:
        return torch.full((3,), {64: 1.1, 32: torch.nan}.get(tile.block_m, 1.0))

    monkeypatch.setattr(WithoutKernels, "_result", result)
    timer = Timer()
    found, _ = run(tmp_path, timer)
    assert all(each.num_failed > 0 for each in found)
    assert {tile.block_m for _, _, tile in timer.timed} == {16}


def test_a_heuristic_that_fails_is_refused(tmp_path: Path) -> None:
    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        raise RuntimeError("no kernel image")

    with pytest.raises(
        Refusal, match=r"gather_gemm can't be tuned for 2 slots.*RuntimeError: no kernel image"
    ):
        run(tmp_path, timer)


def test_a_tile_that_takes_the_device_along_is_skipped_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[Tile] = []

    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        if tile.num_stages == 2 and not failed:
            failed.append(tile)
        if tile in failed:
            raise RuntimeError("illegal memory access")
        return seconds(tile)

    def synchronize() -> None:
        raise RuntimeError("illegal memory access")

    with monkeypatch.context() as patches:
        patches.setattr(torch.cuda, "is_initialized", lambda: True)
        patches.setattr(torch.cuda, "synchronize", synchronize)
        with pytest.raises(
            Refusal, match=r"made the device fail .* run the same command again: it skips this tile"
        ):
            run(tmp_path, timer)
    again = Timer()
    found, _ = run(tmp_path, again)
    assert found[0].num_failed == 1
    assert ("gather_gemm", 2, failed[0]) not in again.timed


def test_a_small_gain_is_noise(tmp_path: Path) -> None:
    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        return 1.0 if tile == gemms[0].heuristic_tile else 0.995

    found, _ = run(tmp_path, timer)
    assert all(each.tile == each.heuristic_tile for each in found)


def test_luck_of_one_measurement_does_not_win(tmp_path: Path) -> None:
    lucky: set[Timed] = set()

    def timer(gemms: Sequence[Gemm], tile: Tile) -> float:
        key = gemms[0].problem.gemm, gemms[0].num_slots, tile
        is_first = key not in lucky
        lucky.add(key)
        return 0.1 if tile.num_stages == 2 and is_first else 1.0

    found, _ = run(tmp_path, timer)
    assert all(each.tile == each.heuristic_tile for each in found)


def test_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found, _ = run(tmp_path, Timer())
    Console(width=150).print(tune._table("[red]model", EXPERTS, found))
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capfd.readouterr().out.splitlines()
        if "│" in line
    ]
    assert [line[:2] for line in lines] == [
        ["1", "gather_gemm"],
        ["1", "scatter_gemm"],
        ["20", "gather_gemm"],
        ["20", "scatter_gemm"],
    ]
    heuristic, before, tuned, after, ratio = lines[0][2:]
    assert heuristic == "16x32x128, num_stages 4, num_warps 4, swapped"
    assert tuned == "the same" or tuned.startswith("16x")
    assert float(ratio) == pytest.approx(float(before) / float(after), abs=0.01)


def test_compiles_ahead_without_loading() -> None:
    with torch.no_grad(), simulated_gpu() as gpu:
        weights = tune.make_weights(EXPERTS, "scatter_gemm", torch.bfloat16, CPU)
        case = DeviceCase(tune.make_gemms(EXPERTS, "scatter_gemm", weights, 20, (0.0,)))
        tiles = case.tiles()[:2]
        case.compile(tiles)
        assert gpu.loaded == gpu.launched == []
        for tile in tiles:
            case._kinds[0][0].run(tile)
        assert gpu.launched == ["scatter_gemm_kernel"] * 2


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=r"results go to .*file.*, which must be a folder that can be written"):
        run(tmp_path / "file" / "tiles", Timer())


def test_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the search."""
    given: list[Any] = []
    found = run(tmp_path, Timer())[0]

    def search_on_gpu(experts: Experts, options: TuneOptions, folder: Path, dtype: Any, device: Any) -> Any:
        given.append((experts, options.tokens, folder, dtype, device))
        return found, folder / "tiles.json"

    monkeypatch.setattr(tune, "tune", search_on_gpu)
    monkeypatch.setattr(tune, "choose_device", lambda name: torch.device("cuda", 1))
    monkeypatch.setattr(tune, "device_name", lambda index: NAME)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(tune.Console, "is_terminal", False)
    sizes = ["--hidden-size", "64", "--intermediate-size", "32", "--num-experts", "4", "--topk", "2"]
    for output in ([], ["--output", str(tmp_path / "mine")]):
        result = invoke(*sizes, "--tokens", "1,20", *output)
        assert result.exit_code == 0, result.output
        folder = tmp_path / "mine" if output else tmp_path
        assert given.pop() == (EXPERTS, (1, 20), folder, torch.bfloat16, torch.device("cuda", 1))
        assert "own sizes, torch.bfloat16; Some GPU 80GB, torch" in " ".join(result.stdout.split())
        assert f"Stored in {folder}" in result.stdout
        assert ("Used where COMPILE_MOE_TILES=" in result.stdout) is bool(output)
    monkeypatch.setenv(tile_file.VARIABLE, "")
    result = invoke(*sizes)
    assert result.exit_code == 2 and "COMPILE_MOE_TILES is empty" in result.stderr


def test_the_kernel_between_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that needs not be there."""
    on_gpu, zeros = torch.device("cuda", 3), torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    # Each GEMM takes 10, what is between them 1, but it is measured as what ``between`` says.
    between = 1.0

    def seconds_per_call(calls: Sequence[Any], device: torch.device, as_graph: bool) -> float:
        assert device == on_gpu and as_graph
        return (10 + 1) / 2 if len(calls) == 4 else between

    monkeypatch.setattr(tune_search, "seconds_per_call", seconds_per_call)
    tune_search._seconds_between.cache_clear()
    gemms: Any = [SimpleNamespace(out=SimpleNamespace(device=on_gpu))] * 2
    tile: Any = None
    assert tune_search.time_on_device(gemms, tile) == 10
    between = 50.0
    assert tune_search.time_on_device(gemms, tile) == 10
    tune_search._seconds_between.cache_clear()
    assert tune_search.time_on_device(gemms, tile) > 0
    tune_search._seconds_between.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real device and kernels
    # With what the heuristic's tiles have there, too.
    choices = CHOICES | {"block_k": (32, 64, 128), "num_stages": (2, 4, 5, 6)}
    monkeypatch.setattr(tile_space, "_CHOICES", choices)
    sizes = ["--hidden-size", "256", "--intermediate-size", "128", "--num-experts", "8", "--topk", "2"]
    result = invoke(*sizes, "--tokens", "1,64", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "No measurement failed" in result.stdout
    (file,) = tmp_path.glob("*.json")
    gemms = json.loads(file.read_text())["gemms"]
    assert [(g["problem"]["gemm"], [t["slots"] for t in g["tiles"]]) for g in gemms] == [
        ("gather_gemm", [2, 128]),
        ("scatter_gemm", [2, 128]),
    ]
