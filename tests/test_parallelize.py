"""Experts on two ranks over gloo: results are those of one rank that has them all.

One test runs all cases in one pair of processes: starting them and importing transformers takes most of the time.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import compile_moe.integrations.transformers as integration
from tests.support.dtensors import run_dtensor_weights
from tests.support.parallelized import run_parallelize
from tests.support.ranks import spawn
from tests.support.transformers_plan import run_plan, save_models

pytest.importorskip("transformers")


def test_two_ranks(seeded: int, tmp_path: Path) -> None:
    integration.register()
    save_models(tmp_path)
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    spawn(_two_ranks, 2, tmp_path, tmp_path, seeded, has_accelerate)
    if not has_accelerate:
        pytest.skip("transformers shards models only with accelerate installed; all else ran")


def _two_ranks(rank: int, num_ranks: int, folder: Path, seed: int, has_accelerate: bool) -> None:
    # Transformers takes the accelerator that there is; the ranks share a machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    integration.register()
    torch.manual_seed(seed)
    run_dtensor_weights(rank)
    run_parallelize(rank, seed)
    torch.manual_seed(seed)
    if has_accelerate:
        run_plan(rank, num_ranks, folder)
