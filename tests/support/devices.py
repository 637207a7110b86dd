"""Cases of tests that run on each device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def on_each_device(names: str, cases: Iterable[tuple[Any, ...]], on_cpu: Iterable[tuple[Any, ...]]) -> Any:
    """Parametrize by ``names`` and ``device``: all cases on a GPU, and on the CPU those of ``on_cpu``."""
    given = [("cpu", *case) for case in on_cpu]
    on_gpu = [pytest.param("cuda", *case, marks=pytest.mark.gpu) for case in cases]
    return pytest.mark.parametrize(f"device,{names}", [*given, *on_gpu], ids=_name)


def _name(value: Any) -> str | None:
    return value.__name__ if isinstance(value, type) else str(value)
