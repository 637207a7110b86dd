"""The fixtures do what tests rely on."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_poisoned_floats_are_nan(poison_empty, dtype):
    x = torch.zeros(4, dtype=dtype)
    allocated = [
        torch.empty(4, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((2, 2), (2, 1), dtype=dtype),
        x.new_empty(4),
        x.new_empty_strided((4,), (1,)),
    ]
    assert all(t.float().isnan().all() for t in allocated)
    assert torch.zeros(4).sum() == 0


def test_poisoned_integers_are_absurd(poison_empty):
    assert (torch.empty(4, dtype=torch.int32) > 2**30).all()
    assert (torch.empty(4, dtype=torch.int64) > 2**60).all()
    assert torch.empty(4, device="meta").is_meta


@pytest.mark.gpu
def test_gpu_tests_run_only_with_a_gpu():
    assert torch.cuda.is_available()


def test_seed_is_shown_and_repeats(tmp_path):
    conftest = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x\n")
    (tmp_path / "test_it.py").write_text(
        "import torch\n\ndef test_it():\n    assert torch.rand(1).item() == 2\n"
    )
    output = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path,
        env={**os.environ, "COMPILE_MOE_TEST_SEED": "5"},
        capture_output=True,
        text=True,
    ).stdout
    torch.manual_seed(5 + zlib.crc32(b"test_it.py::test_it"))
    assert f"assert {torch.rand(1).item()} == 2" in output
    assert output.count("COMPILE_MOE_TEST_SEED=5") == 2, "in the header and with the failure"
