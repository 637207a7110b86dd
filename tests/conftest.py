"""Fixtures of all tests: seeds that change and can be repeated, poisoned allocations, GPU tests skipped."""

import gc
import os
import random
import secrets
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

SEED_VARIABLE = "COMPILE_MOE_TEST_SEED"

# Compilations and interpreted kernels take as long as they take.
# CI draws the same examples again: whether a change lands doesn't depend on luck. Every other run draws its own.
hypothesis.settings.register_profile(
    "compile_moe", deadline=None, print_blob=True, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("compile_moe")


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that workers and the processes that tests start use the same seed.
    os.environ.setdefault(SEED_VARIABLE, str(secrets.randbelow(2**31)))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        # Each worker with as many threads as there are cores takes hundreds of times as long.
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        # For the processes that tests start, too: one that compiles for another takes seconds to start, and to find
        # out which vector instructions compile takes as long in each empty cache; the CPU's flags say which there are.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


def pytest_collection_finish() -> None:
    if not torch.cuda.is_available():
        # What is imported by now stays: no collection need look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(100_000, 20, 50)


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {SEED_VARIABLE}={os.environ[SEED_VARIABLE]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(
            ("Seed", f"{SEED_VARIABLE}={os.environ[SEED_VARIABLE]} repeats this test's inputs")
        )
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the run's seed and the test's name: the order of tests makes no difference."""
    name = request.node.nodeid.rpartition("/")[2]
    seed = int(os.environ[SEED_VARIABLE]) + zlib.crc32(name.encode())
    random.seed(seed)
    torch.manual_seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    return seed


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compile without what earlier tests compiled, and leave nothing behind."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised allocations with NaN or an absurd integer, so that reading one shows in the result.

    Catches what Python allocates by torch.empty, empty_like and empty_strided and the methods new_empty and
    new_empty_strided; fake and meta tensors, and code under compilation, are left alone.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or isinstance(result, FakeTensor) or result.is_meta:
            return result
        return _poison(result)

    return poisoned


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if tensor.dtype is torch.bool:
            tensor.fill_(True)
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            # Not the maximum: an index plus one should stay absurd instead of wrapping around.
            tensor.fill_(torch.iinfo(tensor.dtype).max // 3 * 2)
        elif tensor.itemsize == 1:
            tensor.view(torch.uint8).fill_(0x7F)  # NaN in e4m3fn and e5m2
        else:
            tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device the library has an implementation for; tests on CUDA are marked gpu."""
    name: str = request.param
    return name
