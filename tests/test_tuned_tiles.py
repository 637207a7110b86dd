"""Tuned tiles: files that hold what was stored, and are ignored with a warning if not; launchers that use them."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.testing

from compile_moe.ops import gather_gemm, scatter_gemm, sort_tokens
from compile_moe.ops.kernels import tile_file
from compile_moe.ops.kernels.gather_gemm import gather_gemm_kernel
from compile_moe.ops.kernels.gemm_problem import GemmProblem, Shape
from compile_moe.ops.kernels.heuristic_tiles import tile_candidates
from compile_moe.ops.kernels.scatter_gemm import scatter_gemm_kernel
from compile_moe.ops.kernels.tile_space import tile_space, why_not
from compile_moe.ops.kernels.tiles import DeviceLimits, Tile, device_limits
from compile_moe.ops.kernels.tuned_tiles import TunedTilesWarning, heuristic_choice, tile_choice
from compile_moe.ops.named_activations import program_text
from compile_moe.ops.tuning import store
from tests.support.aot import SHARED_MEMORY_BUDGET
from tests.support.launchers import launch
from tests.support.oracle import make_layer
from tests.support.simulated_gpu import simulated_gpu
from tests.support.tuned_device import NAME, tuned_device

ROOT = Path(__file__).resolve().parent.parent
SHAPE = Shape(4, 64, 32)
GATHER = GemmProblem("gather_gemm", *SHAPE, "bfloat16", "16-bit", "concatenated", False, True, True)
SCATTER = GATHER._replace(gemm="scatter_gemm", layout="ungated")
TILE = Tile(32, 32, 64, 2, 8)
OTHER = Tile(16, 16, 32, 3, 4)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with tuned_device(tmp_path):
        yield tmp_path


def stored(folder: Path) -> Path:
    return store(folder, CPU, SHAPE, {GATHER: {40: TILE, 640: OTHER}, SCATTER: {40: OTHER}})


def test_round_trip(folder: Path) -> None:
    path = stored(folder)
    assert path.parent == folder and path.name.startswith("Some_GPU_80GB-E4-K64-I32-")
    store(folder, CPU, SHAPE, {SCATTER: {8: TILE}, GATHER: {640: TILE}})
    tuned = tile_file.parse(path.read_text(), NAME, SHAPE, device_limits(None))
    assert tuned == {GATHER: {40: TILE, 640: TILE}, SCATTER: {40: OTHER, 8: TILE}}
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".lock"]


@pytest.mark.parametrize(
    ("slots", "tile"),
    [(19, None), (20, TILE), (40, TILE), (80, TILE), (81, None), (320, OTHER), (1281, None)],
)
def test_a_tile_serves_from_half_to_twice_its_slots(folder: Path, slots: int, tile: Tile | None) -> None:
    stored(folder)
    choice = tile_choice(GATHER, slots, None)
    assert choice.tile == (tile or heuristic_choice(GATHER, slots, None).tile)
    assert {TILE, OTHER, *heuristic_choice(GATHER, 1, None).candidates} == set(choice.candidates)


def test_only_the_same_problem(folder: Path) -> None:
    stored(folder)
    for other in (
        GATHER._replace(dtype="float16"),
        GATHER._replace(layout="interleaved"),
        GATHER._replace(transposed=True),
        GATHER._replace(vectorized=False),
        GATHER._replace(num_experts=5),
    ):
        assert tile_choice(other, 40, None) == heuristic_choice(other, 40, None)


def edited(**changes: Any) -> Any:
    return lambda content: {**content, **changes}


def with_tile(**changes: Any) -> Any:
    def edit(content: Any) -> Any:
        content["gemms"][0]["tiles"][0]["tile"].update(changes)
        return content

    return edit


def with_problem(**changes: Any) -> Any:
    def edit(content: Any) -> Any:
        content["gemms"][0]["problem"].update(changes)
        return content

    return edit


DAMAGES: dict[str, tuple[Any, str]] = {
    "truncated": (lambda content: json.dumps(content)[:200], "Unterminated|Expecting"),
    "empty": (lambda content: "", "Expecting value"),
    "not text": (lambda content: b"\xff\xfe\x00", "utf-8"),
    "nested": (lambda content: "[" * 100_000, "nested too deeply"),
    "a list": (lambda content: [], "the file must have the fields device, versions, gemms, got "),
    "no gemms": (
        lambda content: {"device": NAME},
        "must have the fields device, versions, gemms, got device",
    ),
    "gemms are a number": (edited(gemms=3), "gemms must be a list, got 3"),
    "another device": (edited(device="Other GPU"), "device must be Some GPU 80GB, got Other GPU"),
    "other versions": (edited(versions={"torch": "1.0"}), "versions must be .* got {'torch': '1.0'}"),
    "text for a number": (with_tile(block_n="32"), "block_n of a Tile must be int, got '32'"),
    "a truth value for a number": (with_tile(num_warps=True), "num_warps of a Tile must be int, got True"),
    "a number for a truth value": (with_tile(swapped=0), "swapped of a Tile must be bool, got 0"),
    "an unknown field": (with_tile(speed=9), "Tile must have the fields block_m, .* got .*speed"),
    "no power of two": (with_tile(block_k=48), "block_k must be of 16, 32, 64, 128, 256, got 48"),
    "too many stages": (with_tile(num_stages=60), "num_stages must be of .*, got 60"),
    "shared memory": (
        with_tile(block_m=128, block_n=128, block_k=256, num_stages=6, num_warps=8),
        "bytes of shared memory, and there may be 232448",
    ),
    "registers": (with_tile(block_m=128, block_n=128, num_warps=4), "256 accumulators a thread"),
    "swapped and tall": (with_tile(block_m=128, swapped=True, block_n=16), "a block_m of at most 64"),
    "an unknown gemm": (with_problem(gemm="gemm3"), "gemm must be of gather_gemm, scatter_gemm, got 'gemm3'"),
    "an unknown dtype": (with_problem(dtype="int8"), "dtype must be of bfloat16, float16, float32"),
    "another shape": (with_problem(num_experts=5), "a problem must have Shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_once_and_ignored(folder: Path, damage: str) -> None:
    path = stored(folder)
    edit, message = DAMAGES[damage]
    content = edit(json.loads(path.read_text()))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(TunedTilesWarning, match=message) as caught:
        for problem in (GATHER, SCATTER):
            assert tile_choice(problem, 40, None) == heuristic_choice(problem, 40, None)
    assert len(caught) == 1
    assert str(path) in str(caught[0].message) and "compile-moe tune" in str(caught[0].message)
    with pytest.warns(TunedTilesWarning, match="is damaged, and is replaced"):
        stored(folder)
    assert tile_file.parse(path.read_text(), NAME, SHAPE, device_limits(None))[SCATTER] == {40: OTHER}


def test_a_file_for_other_versions_stays_and_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = stored(folder)
    monkeypatch.setattr(tile_file, "versions", lambda: {"torch": "99"})
    with pytest.warns(TunedTilesWarning, match="no tuned tiles for these versions"):
        assert tile_choice(GATHER, 40, None) == heuristic_choice(GATHER, 40, None)
    assert stored(folder) != before and before.exists()


def test_a_folder_that_cannot_be_read_is_reported(folder: Path) -> None:
    stored(folder).unlink()
    (folder / tile_file.file_name(NAME, SHAPE)).mkdir()
    with pytest.warns(TunedTilesWarning, match="Is a directory"):
        assert tile_choice(GATHER, 40, None) == heuristic_choice(GATHER, 40, None)


def test_warnings_that_are_errors_stop_one_call(folder: Path) -> None:
    stored(folder).write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TunedTilesWarning):
            tile_choice(GATHER, 40, None)
        assert tile_choice(GATHER, 40, None) == heuristic_choice(GATHER, 40, None)


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user nobody knows."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(tile_file.VARIABLE, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert tile_file.tiles_folder() is None


def test_the_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(folder)
    first = tile_choice(GATHER, 40, None)
    path.unlink()
    monkeypatch.setenv(tile_file.VARIABLE, "")
    assert tile_choice(GATHER, 40, None) == first
    assert tile_choice(SCATTER, 40, None).tile == OTHER


def test_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(tile_file.VARIABLE, raising=False)
    assert tile_file.tiles_folder() == tmp_path / "compile_moe" / "tiles"
    monkeypatch.setenv(tile_file.VARIABLE, str(tmp_path / "mine"))
    assert tile_file.tiles_folder() == tmp_path / "mine"
    with warnings.catch_warnings(), tuned_device(tmp_path / "no-such-folder"):
        warnings.simplefilter("error")
        assert tile_choice(GATHER, 40, None) == heuristic_choice(GATHER, 40, None)
    with tuned_device(tmp_path):
        stored(tmp_path)
    with tuned_device(""):
        assert tile_file.tiles_folder() is None
        assert tile_choice(GATHER, 40, None) == heuristic_choice(GATHER, 40, None)


WRITER = """
import sys, time, torch
from pathlib import Path
from tests.support.tuned_device import tuned_device
from tests.test_tuned_tiles import GATHER, SHAPE, TILE, store
first, folder = int(sys.argv[1]), Path(sys.argv[2])
with tuned_device(folder):
    (folder / f"ready{first}").touch()
    while len(list(folder.glob("ready*"))) < 2:
        time.sleep(0.001)
    for slots in range(first, first + 80, 2):
        store(folder, torch.device("cpu"), SHAPE, {GATHER: {slots: TILE}})
"""


def test_processes_that_store_at_the_same_time_lose_nothing(folder: Path) -> None:
    path = folder / tile_file.file_name(NAME, SHAPE)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(first), str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for first in (1, 2)
    ]
    while any(writer.poll() is None for writer in writers):
        if path.exists():  # never half a file
            tile_file.parse(path.read_text(), NAME, SHAPE, device_limits(None))
        else:
            time.sleep(0.01)
    assert [writer.returncode for writer in writers] == [0, 0]
    tuned = tile_file.parse(path.read_text(), NAME, SHAPE, device_limits(None))
    assert tuned == {GATHER: dict.fromkeys(range(1, 81), TILE)}
    assert not list(folder.glob("*.tmp"))


def launch_gemms(tokens: int) -> None:
    layer = make_layer(M=tokens, K=64, I=32, E=4, topk=2, dtype=torch.bfloat16)
    slots, offsets = launch(sort_tokens, layer.topk_ids, 4, None)
    arguments = layer.hidden_states, layer.w1, slots, offsets, 2, None, program_text("silu")
    rows = launch(gather_gemm, *arguments)
    launch(scatter_gemm, rows, layer.w2, slots, offsets, tokens, 2, None)


def block_sizes(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """BLOCK_M, BLOCK_N and BLOCK_K of a launch."""
    names = list(inspect.signature(kernel).parameters)
    return tuple(arguments[names.index(name)] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))


def test_launchers_use_tuned_tiles_and_time_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(folder)

    def no_timing(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is timed")

    monkeypatch.setattr(torch.cuda, "Event", no_timing)
    monkeypatch.setattr(triton.testing, "do_bench", no_timing)
    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", no_timing)
    with simulated_gpu() as gpu:
        launch_gemms(20)
        _, first, second = gpu.launched
        assert (first, second) == ("gather_gemm_kernel", "scatter_gemm_kernel")
        kernels = gather_gemm_kernel, scatter_gemm_kernel.fn
        assert block_sizes(kernels[0], gpu.arguments[1]) == TILE[:3]
        assert block_sizes(kernels[1], gpu.arguments[2]) == OTHER[:3]
        loaded = [name for name in gpu.loaded if "gemm" in name]
        gpu.capturing = True
        launch_gemms(20)
        assert block_sizes(kernels[0], gpu.arguments[-2]) == TILE[:3]
        for tokens in (1, 90, 160, 320):
            launch_gemms(tokens)
        assert [name for name in gpu.loaded if "gemm" in name] == loaded
        assert block_sizes(kernels[0], gpu.arguments[-2]) == OTHER[:3]


def test_layers_load_nothing_of_the_tuner() -> None:
    """Importing the library and calling a layer."""
    code = (
        "import sys, torch, compile_moe; x, w = torch.randn(3, 4), torch.randn(2, 8, 4); "
        "compile_moe.fused_experts(x, w, w[:, :4, :4].contiguous(), torch.ones(3, 1), torch.zeros(3, 1).long()); "
        "names = 'compile_moe.cli', 'compile_moe.ops.tuning', 'platformdirs'; "
        "print(*(m for m in sys.modules if m.startswith(names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize("capability", SHARED_MEMORY_BUDGET)
@pytest.mark.parametrize("vectorized", [True, False], ids=["vectorized", "one-by-one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["concatenated", "ungated"])
def test_the_space_holds_every_tile_of_the_heuristic(
    layout: str, dtype: str, vectorized: bool, capability: int
) -> None:
    limits = DeviceLimits(SHARED_MEMORY_BUDGET[capability], capability in (90, 100))
    for precision in ("ieee", "tf32") if dtype == "float32" else ("16-bit",):
        for sizes in ((128, 2048, 768), (128, 2880, 2880), (8, 4096, 14336), (7, 77, 51), (2, 1, 1)):
            problem = GemmProblem("gather_gemm", *sizes, dtype, precision, layout, False, vectorized, False)
            arguments = problem.itemsize, problem.num_columns, problem.depth, problem.num_accumulators
            for transposed in (False, True):
                for tile in tile_candidates(*arguments, vectorized, transposed, limits):
                    assert why_not(tile, problem, limits) == ""
            for slots in (1, 128, 8192, 2**20):
                tiles = tile_space(problem, slots, limits)
                assert 20 <= len(tiles) <= 1000 or sizes[1] < 100, len(tiles)
                assert len(set(tiles)) == len(tiles) > 0
