"""Modules with the signatures of other libraries' experts, which need a GPU.

Each checks the form of what it gets and computes slot by slot.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.oracle import swigluoai

Function = Callable[[Tensor], Tensor]


class Peer(NamedTuple):
    """What a library saw: the weights' addresses of each call; ``wrong`` is added to its first token."""

    weights: list[tuple[int, int]]
    wrong: Tensor


def silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_interleaved(gate_up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate_up[..., ::2]) * gate_up[..., 1::2]


def added(x: Tensor, w: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    """w (E, rows, columns) of one expert times x (columns,), float32."""
    product = w[expert].float() @ x.float()
    return product if bias is None else product + bias[expert].float()


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def install_vllm(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    class MoEActivation(enum.Enum):
        SILU = "silu"
        SWIGLUOAI = "swigluoai"

    functions: dict[MoEActivation, Function] = {MoEActivation.SILU: silu, MoEActivation.SWIGLUOAI: swigluoai}

    def fused_experts(
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation = MoEActivation.SILU,
        apply_router_weight_on_input: bool = False,
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        quant_config: Any = None,
    ) -> Tensor:
        assert hidden_states.is_contiguous() and w1.stride(-1) == w2.stride(-1) == 1
        assert (topk_weights.dtype, topk_ids.dtype) == (torch.float32, torch.int32)
        peer.weights.append((w1.data_ptr(), w2.data_ptr()))
        b1, b2 = (None, None) if quant_config is None else quant_config
        out = torch.zeros(hidden_states.shape)
        for token, slots in enumerate(zip(topk_ids.tolist(), topk_weights.tolist(), strict=True)):
            for expert, weight in zip(*slots, strict=True):
                rows = functions[activation](added(hidden_states[token], w1, b1, expert))
                out[token] += weight * added(rows, w2, b2, expert)
        out[0] += peer.wrong
        return out.to(hidden_states.dtype)

    package = "vllm.model_executor.layers.fused_moe"
    install(
        monkeypatch,
        **{
            f"{package}.fused_moe": {"fused_experts": fused_experts},
            f"{package}.config": {"biased_moe_quant_config": lambda w1_bias, w2_bias: (w1_bias, w2_bias)},
            f"{package}.activation": {"MoEActivation": MoEActivation},
        },
    )


def install_sonicmoe(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    activation_type = enum.Enum("ActivationType", {"SWIGLU": "swiglu", "GEGLU": "geglu"})

    def moe_general_routing_inputs(
        x: Tensor,
        router_scores: Tensor,
        token_indices: Tensor,
        expert_indices: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        E: int,
        stream_id: int,
        activation_type_: Any,
        is_inference_mode_enabled: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert activation_type_ is activation_type["SWIGLU"] and is_inference_mode_enabled
        # The inner dimension of each product is contiguous, experts the outermost.
        assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
        assert E == w1.size(2) == w2.size(2) and x.size(1) == w1.size(1) == w2.size(0)
        assert (router_scores.dtype, token_indices.dtype, expert_indices.dtype) == (
            torch.float32,
            torch.int32,
            torch.int32,
        )
        assert token_indices.tolist() == sorted(token_indices.tolist())
        peer.weights.append((w1.data_ptr(), w2.data_ptr()))
        out = torch.zeros(x.shape)
        slots = zip(token_indices.tolist(), expert_indices.tolist(), router_scores.tolist(), strict=True)
        for token, expert, score in slots:
            rows = silu_interleaved(added(x[token], w1.permute(2, 0, 1), b1, expert))
            out[token] += score * added(rows, w2.permute(2, 0, 1), b2, expert)
        out[0] += peer.wrong
        return out.to(x.dtype), torch.bincount(expert_indices, minlength=E)

    install(
        monkeypatch,
        **{
            "sonicmoe.functional": {"moe_general_routing_inputs": moe_general_routing_inputs},
            "sonicmoe.enums": {"ActivationType": activation_type},
        },
    )


def install_scattermoe(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        experts, slots = torch.sort(expert_idxs.flatten())
        return experts, slots, experts.bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs: Tensor,
        expert_weights: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        expert_biases: Tensor | None = None,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        assert grouped_in is not grouped_out and inputs.size(1) == expert_weights.size(1)
        assert expert_offsets.tolist()[-1] == sorted_expert_idxs.numel() == inputs.size(0) * k
        peer.weights.append((expert_weights.data_ptr(), 0))
        out = torch.zeros(sorted_expert_idxs.numel(), expert_weights.size(2))
        pairs = zip(sorted_expert_idxs.tolist(), sorted_scattered_idxs.tolist(), strict=True)
        for position, (expert, slot) in enumerate(pairs):
            row = inputs[position if grouped_in else slot // k]
            out[position if grouped_out else slot] = added(row, expert_weights.mT, expert_biases, expert)
        out = out.to(inputs.dtype)
        if gates is None:
            return out
        weighted = (gates.unsqueeze(1) @ out.view(*gates.shape, -1)).squeeze(1)
        weighted[0] += peer.wrong
        return weighted

    content = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    install(monkeypatch, **{"scattermoe.parallel_experts": content})


def install_triton_kernels(monkeypatch: pytest.MonkeyPatch, peer: Peer) -> None:
    swiglu_fn = object()
    # What the fused function computes on a GPU, by its name and arguments.
    functions: dict[tuple[str, tuple[object, ...]], Function] = {
        ("silu_and_mul", ()): silu_interleaved,
        ("swiglu", (1.702, 7.0)): swigluoai,
    }

    def topk(x: Tensor, k: int, apply_softmax: bool = True, dim: int = 1, y_indx: Any = None) -> Any:
        assert not apply_softmax and dim == 1 and y_indx.shape == (x.size(0), k)
        order = y_indx.flatten().argsort(stable=True).int()
        metadata = SimpleNamespace(
            col_sum=torch.bincount(y_indx.flatten(), minlength=x.size(1)).int(),
            col_sorted_indx=order,
            row_sorted_indx=order.argsort().int(),
        )
        return SimpleNamespace(vals=x.gather(1, y_indx.long()), indx=y_indx, mask_metadata=metadata)

    def make_ragged_tensor_metadata(slice_sizes: Tensor, n_gates: int) -> Tensor:
        assert slice_sizes.dtype is torch.int32 and n_gates == int(slice_sizes.sum())
        return slice_sizes

    def matmul(
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        a_ragged_metadata: Tensor,
        gather_indx: Tensor | None = None,
        scatter_indx: Tensor | None = None,
        gammas: Tensor | None = None,
        fused_activation: Any = None,
    ) -> Tensor:
        assert b.mT.is_contiguous() and (bias is None or bias.dtype is torch.float32)
        assert all(i.dtype is torch.int32 for i in (gather_indx, scatter_indx) if i is not None)
        peer.weights.append((b.data_ptr(), 0))
        rows = a if gather_indx is None else a[gather_indx]
        experts = torch.arange(b.size(0)).repeat_interleave(a_ragged_metadata)
        out = torch.stack([added(row, b.mT, bias, e) for row, e in zip(rows, experts.tolist(), strict=True)])
        if fused_activation is not None:
            specs, arguments = fused_activation
            assert specs.reduction_n == 2 and len(specs.fn_arg_names) == len(arguments)
            assert (specs.fn is swiglu_fn) is (specs.name == "swiglu")
            out = functions[specs.name, arguments](out)
        if gammas is not None:
            out = out * gammas[:, None]
        if scatter_indx is not None:
            out = torch.empty_like(out).index_copy_(0, scatter_indx.long(), out)
        return out.to(a.dtype)

    def reduce(x: Tensor, dim: int) -> tuple[Tensor, None]:
        out = x.float().sum(dim)
        out[0] += peer.wrong
        return out.to(x.dtype), None

    def specs(name: str, fn: object, fn_arg_names: tuple[str, ...], reduction_n: int = 1) -> SimpleNamespace:
        return SimpleNamespace(name=name, fn=fn, fn_arg_names=fn_arg_names, reduction_n=reduction_n)

    install(
        monkeypatch,
        **{
            "triton_kernels.matmul": {"matmul": matmul, "FusedActivation": lambda specs, args: (specs, args)},
            "triton_kernels.specialize": {"FnSpecs": specs},
            "triton_kernels.topk": {"topk": topk},
            "triton_kernels.tensor": {"make_ragged_tensor_metadata": make_ragged_tensor_metadata},
            "triton_kernels.reduce": {"reduce": reduce},
            "triton_kernels.swiglu": {"swiglu_fn": swiglu_fn},
        },
    )


INSTALL = {
    "vllm": install_vllm,
    "sonicmoe": install_sonicmoe,
    "scattermoe": install_scattermoe,
    "triton_kernels": install_triton_kernels,
}
