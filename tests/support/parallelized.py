"""Experts modules and models that ``compile_moe.parallelize`` spreads over two ranks, compared with whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import compile_moe.integrations.transformers as integration
from compile_moe import ExpertPlacement, parallelize
from compile_moe.integrations.quantized_experts import ExpertsQuantization, quantize_module
from tests.support.quantized import Variant, make_quantized
from tests.support.quantized_models import experts_of, logits, make_model, prompt
from tests.support.tiny_models import COMMON
from tests.test_transformers_experts import LAYOUTS, make_experts
from tests.test_transformers_fp8 import BLOCK, fp8_experts

PLAIN, BIASED, UNGATED = LAYOUTS
#: Of a rank's tokens: the ranks have different numbers.
NUM_TOKENS = [[5, 9], [7, 0], [2, 3]]


def run_parallelize(rank: int, seed: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    copies = ExpertPlacement.linear(6, 2).with_copies({0: [1]})
    for name, layout, change, options in (
        ("plain", PLAIN, None, {}),
        ("plain, all_gather", PLAIN, None, {"dispatch": "all_gather", "placement": "round_robin"}),
        ("biased", BIASED, None, {"placement": copies}),
        ("ungated", UNGATED, None, {"dispatch": "all_gather", "num_tokens": 9}),
        ("batched", BIASED, None, {"dispatch": "batched", "max_tokens_per_rank": 20, "placement": copies}),
        ("bfloat16", PLAIN, lambda e: e.to(torch.bfloat16), {"placement": "round_robin"}),
        ("int8", BIASED, lambda e: quantize_module(e, ExpertsQuantization("int8_w8a16")), {}),
        (
            "fp8",
            PLAIN,
            lambda e: quantize_module(e, ExpertsQuantization("fp8_w8a8_channel")),
            {"placement": copies},
        ),
        (
            "fp8, batched",
            PLAIN,
            lambda e: quantize_module(e, ExpertsQuantization("fp8_w8a8_channel")),
            {"dispatch": "batched", "max_tokens_per_rank": 20},
        ),
        ("FP8Experts", _fp8_experts, None, {"placement": "round_robin"}),
        ("normed", PLAIN, _with_norm, {"placement": "round_robin"}),
    ):
        # Weights are the same on both ranks, the tokens that they drew before are not.
        torch.manual_seed(seed)
        try:
            _run_module(rank, mesh, layout, change, options)
        except Exception as e:
            raise AssertionError(f"{name}, rank {rank}: {e}") from e
    torch.manual_seed(seed)
    _distributed_weights(rank, mesh)
    torch.manual_seed(seed)
    _model_from_meta(rank, mesh)
    _refusals(rank, mesh)


def _fp8_experts(block: tuple[int, int] | None = BLOCK, static: Any = None) -> Any:
    variant = Variant("fp8_w8a8_tensor") if static else Variant("fp8_w8a8_block", (("block_shape", BLOCK),))
    q = make_quantized(variant, E=6, K=24)
    weights = (p._replace(scale=p.scale.view(6, 1, 1)) if static else p for p in (q.q1, q.q2))
    return fp8_experts(*weights, block, static)


def _routed(whole: Any, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index, top_k_weights; some slots skipped."""
    is_half = whole.down_proj.dtype is torch.bfloat16 if hasattr(whole, "down_proj") else False
    weights, ids = torch.rand(num_tokens, 6).topk(2)
    ids = ids.masked_fill(torch.rand(ids.shape) < 0.2, 6)
    return torch.randn(num_tokens, 24).to(torch.bfloat16 if is_half else torch.float32), ids, weights


class _Norm(nn.Module):
    """A norm that makes something of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) + 1


def _with_norm(experts: Any) -> None:
    experts.has_post_expert_norm, experts.post_expert_norm = True, _Norm()


def _run_module(rank: int, mesh: Any, layout: Any, change: Callable[[Any], Any] | None, options: Any) -> None:
    whole = layout() if callable(layout) else make_experts(*layout)
    if change is not None:
        change(whole)
    experts = copy.deepcopy(whole)
    assert parallelize(experts, mesh["ep"], **options) is experts
    placement = experts.compile_moe_prepare_finalize.placement
    local = list(placement.local_experts[rank])
    for name, held in experts.named_parameters(recurse=False):
        assert torch.equal(held, getattr(whole, name)[local])
        assert held.untyped_storage().nbytes() == held.nbytes
    _assert_as_whole(experts, whole, rank)
    experts.load_state_dict(whole.state_dict())
    experts.load_state_dict(copy.deepcopy(experts.state_dict()))
    _assert_as_whole(copy.deepcopy(experts), whole, rank)


def _assert_as_whole(experts: nn.Module, whole: nn.Module, rank: int) -> None:
    rounds_tokens = any(held.dtype is torch.float8_e4m3fn for held in whole.parameters())
    for counts in NUM_TOKENS:
        arguments = _routed(whole, counts[rank])
        result, expected = experts(*arguments), whole(*arguments)
        # Sums of the two ranks' parts round once more.
        tolerance = 3e-2 if arguments[0].dtype is torch.bfloat16 else 1e-5
        if rounds_tokens and counts[rank] > 0:
            # Rows that differ in their last bit may be quantized to neighbours in float8, a 16th apart: seldom.
            size = expected.abs().amax(1, keepdim=True)
            assert ((result - expected).abs() <= size / 16).all()
            same = ((result - expected).abs() <= tolerance * (1 + size)).all(1)
            assert int((~same).sum()) <= 1, f"{int((~same).sum())} of {counts[rank]} tokens differ"
        else:
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def _distributed_weights(rank: int, mesh: Any) -> None:
    """By expert, as they stay; by rows, by expert in another order, and copied, which is cut anew."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = make_experts(*BIASED)
    experts = copy.deepcopy(whole)
    for name, on, layout in (
        ("gate_up_proj", mesh, Shard(0)),
        ("down_proj", mesh, Shard(1)),
        ("gate_up_proj_bias", DeviceMesh("cpu", [1, 0]), Shard(0)),
        ("down_proj_bias", mesh, Replicate()),
    ):
        held = distribute_tensor(getattr(whole, name), on, [layout])
        setattr(experts, name, nn.Parameter(held))
    with pytest.raises(ValueError, match=r"gate_up_proj is sharded over ranks, 3 of 6 experts on this one"):
        experts(*_routed(whole, 3))
    _assert_as_whole(parallelize(experts, mesh), whole, rank)


def _model_from_meta(rank: int, mesh: Any) -> None:
    """Loaded from the whole model's weights."""
    whole = make_model("qwen3_moe", experts="eager")
    seen = []

    def placement(name: str, num_experts: int, num_ranks: int) -> ExpertPlacement:
        seen.append((name, num_experts, num_ranks))
        return ExpertPlacement.round_robin(num_experts, num_ranks)

    model = copy.deepcopy(whole)
    for experts in experts_of(model):
        experts.to("meta")
    parallelize(model, mesh, placement=placement)
    assert seen == [(f"model.layers.{i}.mlp.experts", 8, 2) for i in range(2)]
    model.load_state_dict(whole.state_dict(), assign=True)
    ids = prompt("cpu", 7 + rank)
    torch.testing.assert_close(logits(model, ids), logits(whole, ids), rtol=1e-4, atol=1e-4)
    _compiled_once(rank, *(m.model.layers[0].mlp for m in (model, whole)))
    with pytest.raises(RuntimeError, match="save_pretrained would write one rank's experts"):
        model.save_pretrained("unused")
    with pytest.raises(
        ValueError, match=r"Qwen3MoeExperts at model.layers.0.mlp.experts is parallelized already"
    ):
        parallelize(model, mesh)
    with pytest.raises(ValueError, match=r"quantize a model before compile_moe.parallelize"):
        integration.quantize_experts(model, "int8_w8a16")


def _compiled_once(rank: int, block: nn.Module, whole: nn.Module) -> None:
    """Router and experts in one graph for all numbers of tokens."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for counts in NUM_TOKENS:
        hidden_states = torch.randn(1, counts[rank] + 2, COMMON["hidden_size"])
        torch._dynamo.mark_dynamic(hidden_states, 1)
        torch.testing.assert_close(compiled(hidden_states), whole(hidden_states), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def _refusals(rank: int, mesh: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    experts = make_experts(*PLAIN)
    before = dict(vars(experts))

    def refused(
        error: type[Exception], message: str, module: Any = experts, on: Any = mesh, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            parallelize(module, on, **options)

    square = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep"))
    refused(
        ValueError,
        r"one dimension, .* got \(2, 1\) with dimensions .*; pass one of them: mesh\['ep'\]",
        on=square,
    )
    refused(TypeError, "mesh must be a .*DeviceMesh, got ProcessGroup", on=dist.group.WORLD)
    refused(
        ValueError,
        "dispatch must be one of 'all_to_all', 'all_gather', 'batched', got 'sent'",
        dispatch="sent",
    )
    refused(ValueError, "got dispatch='batched' and max_tokens_per_rank=None", dispatch="batched")
    refused(ValueError, "got dispatch='all_to_all' and max_tokens_per_rank=3", max_tokens_per_rank=3)
    refused(ValueError, "num_tokens is for dispatch='all_gather', got num_tokens=3", num_tokens=3)
    refused(TypeError, "module must be a torch.nn.Module, got dict", module={})
    refused(ValueError, "Linear has no experts that transformers dispatches", module=nn.Linear(2, 2))
    refused(ValueError, "placement must be one of 'linear', 'round_robin', got 'best'", placement="best")
    refused(TypeError, "or a function .* got int", placement=lambda *_: 3)
    other = ExpertPlacement.linear(5, 2)
    refused(ValueError, "for 6 experts on 2 ranks at the module, got one for 5 on 2", placement=other)
    hooked = copy.deepcopy(experts)
    hooked.forward = lambda *args: None
    refused(ValueError, "Qwen3MoeExperts has a forward of its own", module=hooked)
    odd = copy.deepcopy(experts)
    odd.scale = nn.Parameter(torch.ones(3))
    refused(NotImplementedError, r"first dimension are its experts, got .*scale \(3,\)", module=odd)
    static = _fp8_experts(None, static=(torch.ones(6), torch.ones(6)))
    refused(NotImplementedError, "has static scales of its tokens", module=static)
    alone = DeviceMesh("cpu", [1])
    if rank == 0:
        refused(ValueError, "this process is not in the mesh", on=alone)
    assert vars(experts) == before
    moved = parallelize(copy.deepcopy(experts), mesh).to("meta")
    with pytest.raises(
        ValueError, match=r"tokens are on meta, but compile_moe.parallelize put these experts on cpu"
    ):
        moved(*(t.to("meta") for t in _routed(experts, 3)))
