"""Each example runs by itself and prints what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

#: A line that each example prints.
LINES = {
    "compiled_function": r"compiled 1 time(s) on",
    "cuda_graph_capture": (
        "replay 2: equal to the eager result"
        if torch.cuda.is_available()
        else "no CUDA device here: nothing to capture"
    ),
    "hugging_face_model": "generate(): 8 tokens, those that transformers' experts give",
    "own_activation": "an overridden method: as computed token by token",
    "own_prepare_finalize_and_experts": "PaddedTokens with DenseExperts, compiled: equal to fused_experts",
    "first_call": "first compiled call, warm caches:",
    "quantization_error": "mxfp4_w4a16            0.",
    "expert_parallel": "BatchedAllToAllPrepareAndFinalize on 2 ranks",
}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In another directory: an example must not count on the repository's."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LINES, "opcheck_in_your_tests"}


@pytest.mark.parametrize("name", LINES)
def test_example(name: str, tmp_path: Path) -> None:
    by_torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    file = str(EXAMPLES / f"{name}.py")
    done = run(*(by_torchrun if name == "expert_parallel" else ()), file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert LINES[name] in done.stdout


def test_opcheck_example_under_pytest(tmp_path: Path) -> None:
    """Its main function calls the test."""
    done = run(
        *("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull),
        f"--rootdir={tmp_path}",
        str(EXAMPLES / "opcheck_in_your_tests.py"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "compile_moe::fused_moe: test_schema" in done.stdout and "all ops of compile_moe" in done.stdout


def test_importing_an_example_runs_nothing(tmp_path: Path) -> None:
    """And expert_parallel says how to start it."""
    uses = "; ".join(f"import {file.stem}; {file.stem}.main" for file in EXAMPLES.glob("*.py"))
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); {uses}; expert_parallel.main()"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("start me by: torchrun") and done.stdout.count("\n") == 1
