"""Models sharded by transformers' own expert-parallel plan, whose logits are those of one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from tests.support.quantized_models import experts_of, load, logits, make_model, prompt
from tests.support.tiny_models import COMMON

NUM_EXPERTS = 8


def save_models(folder: Path) -> None:
    """What the ranks load: plain weights; transposed ones with biases; these in mxfp4."""
    import transformers

    for family in ("qwen3_moe", "gpt_oss"):
        make_model(family, num_hidden_layers=1).save_pretrained(folder / family)
    quantized = load(folder / "gpt_oss", quantization_config=transformers.Mxfp4Config())
    quantized.save_pretrained(folder / "mxfp4")


def run_plan(rank: int, num_ranks: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
    ids = prompt("cpu")
    for name in ("qwen3_moe", "gpt_oss", "mxfp4"):
        alone = load(folder / name)
        for way, config in _configs():
            model = load(folder / name, distributed_config=config)
            held = {p.to_local().size(0) for p in experts_of(model)[0].parameters()}
            assert held == {NUM_EXPERTS // num_ranks}, f"{name}, {way}: {held}"
            _assert_equal(model, alone, ids, f"{name}, {way}")
            # all_to_all compiles so with no experts: transformers branches on the number of rows that arrive.
            if name == "qwen3_moe" and way != "all_to_all":
                block = model.model.layers[0].mlp
                hidden_states = torch.randn(2, 5, COMMON["hidden_size"])
                compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
                torch.testing.assert_close(compiled(hidden_states), block(hidden_states))
        if name != "mxfp4":
            for m in (alone, model):
                integration.quantize_experts(m, "int8_w8a16")
            _assert_equal(model, alone, ids, f"{name}, quantized in place")


def _configs() -> Iterator[tuple[str, Any]]:
    """The ways in which transformers brings tokens to experts; its older versions have one."""
    from transformers.distributed import DistributedConfig

    if not hasattr(DistributedConfig, "ep_implementation"):
        yield "masked", DistributedConfig(tp_size=2, enable_expert_parallel=True)
        return
    for way in ("all_reduce", "all_to_all"):
        yield way, DistributedConfig(tp_size=2, ep_size=2, ep_implementation=way)


def _assert_equal(model: nn.Module, alone: nn.Module, ids: Tensor, name: str) -> None:
    def say(text: str) -> str:
        return f"{name}: {text}"

    # What is sharded beside the experts sums in another order.
    torch.testing.assert_close(logits(model, ids), logits(alone, ids), rtol=1e-4, atol=1e-4, msg=say)
