"""Run each file of ``tests/interpreted`` in a process whose Triton interprets."""

from pathlib import Path

import pytest

from tests.support.interpreter import is_interpreting, run_interpreted

FILES = sorted(Path(__file__).with_name("interpreted").glob("test_*.py"))


@pytest.mark.skipif(is_interpreting(), reason="this process interprets: its files are collected directly")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    run_interpreted(file)
