"""Run the files of ``tests/interpreted`` in processes whose Triton interprets."""

from pathlib import Path

import pytest

from tests.support.interpreter import is_interpreting, run_interpreted

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))
#: Each in a process of its own, and the others, which take less time than it takes to start one, together.
LONG = ("test_quantized_gemms", "test_batch", "test_kernels", "test_quantize_tokens")
PROCESSES = {name: [file for file in FILES if file.stem == name] for name in LONG}
PROCESSES["others"] = [file for file in FILES if file.stem not in LONG]


@pytest.mark.skipif(is_interpreting(), reason="this process interprets: its files are collected directly")
@pytest.mark.parametrize("process", PROCESSES)
def test_interpreted(process: str) -> None:
    run_interpreted(*PROCESSES[process])
