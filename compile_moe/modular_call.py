"""A call of the modular kernel in three steps: start, compute, result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike
from compile_moe.dtensor_weights import local_tensors
from compile_moe.modular_parts import (
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    PrepareResult,
    is_method,
)
from compile_moe.ops.layer_checks import check_call
from compile_moe.ops.problem_size import (
    _moe_problem_size,
    require,
    require_optional_tensors,
    require_tensors,
    shape,
)


@dataclass
class Arguments:
    """What :meth:`compile_moe.FusedMoEModularKernel.forward` takes.

    A call replaces DTensor weights in it. Not a tuple: on those made in code that it traces, dynamo of torch 2.11 hides
    an error behind one of its own.
    """

    hidden_states: Tensor
    w1: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    inplace: bool = False
    activation: ActivationLike = "silu"
    global_num_experts: int = -1
    expert_map: Tensor | None = None
    w1_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w1_zp: Tensor | None = None
    w2_zp: Tensor | None = None
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None
    apply_router_weight_on_input: bool = False


class ModularCall:
    """A call of a layer: :meth:`compile_moe.FusedMoEModularKernel.start` sends the tokens to their experts.

    ``compute`` waits for the tokens, runs the experts and sends the results back; ``result`` waits for these. Take
    every call to its result, on all ranks of a group in the same order.
    """

    def __init__(
        self,
        parts: FusedMoEPrepareAndFinalize,
        experts: FusedMoEPermuteExpertsUnpermute,
        arguments: Arguments,
    ) -> None:
        a = arguments
        require_tensors(
            hidden_states=a.hidden_states,
            w1=a.w1,
            w2=a.w2,
            topk_weights=a.topk_weights,
            topk_ids=a.topk_ids,
        )
        require_optional_tensors(expert_map=a.expert_map)
        a.w1, a.w2, a.w1_scale, a.w2_scale, a.w1_zp, a.w2_zp = local_tensors(
            parts,
            ("w1", a.w1),
            ("w2", a.w2),
            ("w1_scale", a.w1_scale),
            ("w2_scale", a.w2_scale),
            ("w1_zp", a.w1_zp),
            ("w2_zp", a.w2_zp),
        )
        # No more than what holds for every format of weights: the experts check theirs.
        check_call(
            a.hidden_states,
            a.w1,
            a.w2,
            a.topk_weights,
            a.topk_ids,
            a.expert_map,
            a.apply_router_weight_on_input,
        )
        self._parts, self._experts, self._arguments = parts, experts, a
        E, M, N, K, topk = self._sizes = _moe_problem_size(a.hidden_states, a.w1, a.w2, a.topk_ids)
        local = parts.experts_of_rank
        require(
            local is None or local == E,
            lambda: (
                f"w1 and w2 must hold the {local} experts of this rank, got {E}; of weights of all experts pass "
                "w1[list(placement.local_experts[rank])], and w2 alike"
            ),
        )
        num_experts = a.global_num_experts
        if num_experts == -1:
            num_experts = E if a.expert_map is None else a.expert_map.size(0)
        self._num_experts = num_experts
        # Overridden on a subclass, a mixin or an instance: then the shortcut doesn't speak for it.
        self._has_unfilled = is_method(experts.apply, type(experts).apply_unfilled_counterpart)
        self._has_reduce = is_method(parts.finalize, type(parts).reduce_counterpart)

        # As published, buffers exist before prepare, and hold zeros.
        self._output: Tensor | None = None
        if not self._has_reduce:
            self._output = a.hidden_states if a.inplace else torch.zeros_like(a.hidden_states)
        size13, size2, workspace_dtype = 0, 0, a.hidden_states.dtype
        if not self._has_unfilled:
            size13, size2, workspace_dtype = experts.workspace_shapes(
                a.hidden_states, M, N, K, topk, num_experts
            )
        self._workspaces: tuple[Tensor, ...] = tuple(
            [a.hidden_states.new_zeros(size, dtype=workspace_dtype) for size in (size13, size2)]
        )

        prepare_arguments = (
            a.hidden_states,
            a.a1_scale,
            a.a2_scale,
            a.topk_weights,
            a.topk_ids,
            num_experts,
            a.expert_map,
            a.apply_router_weight_on_input,
        )
        self._arrived: Callable[[], Any] | None = None
        self._prepared: Any = None
        if is_method(parts.prepare, type(parts).prepare_async_counterpart):
            self._arrived = parts.prepare_async(*prepare_arguments)  # type: ignore[misc]
        else:
            self._prepared = parts.prepare(*prepare_arguments)
        self._is_begun = self._is_computed = False
        self._returned: Callable[[], Tensor] | None = None
        self._result: Tensor | None = None

    def compute(self) -> None:
        """Wait for the tokens, run the experts and start to send the results back. A second time: nothing.

        Raises:
            RuntimeError: an earlier ``compute`` of this call raised.
        """
        if self._is_computed:
            return
        if self._is_begun:
            raise RuntimeError("this call failed when it was computed: start another")
        self._is_begun = True
        a, parts, experts = self._arguments, self._parts, self._experts
        E, _, _, K, topk = self._sizes
        arrived, prepared = self._arrived, self._prepared
        # What was sent, and what came, need not outlive their use.
        self._arrived = self._prepared = None
        if arrived is not None:
            prepared = arrived()
            del arrived
        a1q, a1q_scale, expert_num_tokens, ids, weights = _prepare_result(
            prepared, a.topk_ids, a.topk_weights
        )
        is_batched = a1q.dim() == 3
        unfilled = self._has_unfilled and self._has_reduce
        # A user's experts may make tokens of a batch; ours return what they get.
        require(
            not self._has_reduce or is_batched is parts.reduces_batches or (is_batched and not unfilled),
            lambda: (
                f"{type(parts).__name__} prepared {shape(a1q)}, but its finalize is for "
                f"{'batches (E, max_num_tokens, K)' if parts.reduces_batches else 'tokens (M, K)'}; override "
                "finalize, too"
            ),
        )
        apply = experts.apply_unfilled if unfilled else experts.apply
        fused_out = apply(  # type: ignore[misc]
            a1q,
            a.w1,
            a.w2,
            ids,
            activation=a.activation,
            global_num_experts=self._num_experts,
            expert_map=a.expert_map,
            w1_scale=a.w1_scale,
            w2_scale=a.w2_scale,
            w1_zp=a.w1_zp,
            w2_zp=a.w2_zp,
            a1q_scale=a1q_scale,
            a2_scale=a.a2_scale,
            workspace13=self._workspaces[0],
            workspace2=self._workspaces[1],
            expert_num_tokens=expert_num_tokens,
        )
        if self._output is not None:
            parts.finalize(
                self._output, fused_out, a.topk_weights, a.topk_ids, a.apply_router_weight_on_input
            )
            self._result = self._output
            self._finish()
            return
        mask = (ids, a.expert_map, E) if unfilled else (None, None, -1)
        if not unfilled:
            sizes = "E, max_num_tokens, K" if parts.reduces_batches else "M, topk, K"
            expected = (*(a1q.shape[:2] if parts.reduces_batches else (ids.size(0), topk)), K)
            require(
                tuple(fused_out.shape) == expected,
                lambda: f"apply must return ({sizes}) = {expected}, got {shape(fused_out)}",
            )
            fused_out = fused_out.to(a.hidden_states.dtype)
        reduce_arguments = fused_out, weights, *mask, a.apply_router_weight_on_input
        if is_method(parts.reduce, type(parts).reduce_async_counterpart):  # type: ignore[arg-type]
            self._returned = parts.reduce_async(*reduce_arguments)  # type: ignore[misc]
        else:
            self._result = self._written(parts.reduce(*reduce_arguments))  # type: ignore[misc]
        self._finish()

    def result(self) -> Tensor:
        """(M, K), after ``compute`` if that was not called."""
        self.compute()
        if self._result is None:
            returned, self._returned = self._returned, None
            self._result = self._written(returned())  # type: ignore[misc]
        return self._result

    def _finish(self) -> None:
        """Let go of what only ``compute`` needs."""
        self._workspaces, self._output = (), None
        self._is_computed = True

    def _written(self, result: Tensor) -> Tensor:
        _, M, _, K, _ = self._sizes
        require(
            tuple(result.shape) == (M, K),
            lambda: (
                f"reduce must return (M, K) = {(M, K)}, got {shape(result)}; where prepare dispatches other rows, "
                "finalize must bring them back: override it"
            ),
        )
        return self._arguments.hidden_states.copy_(result) if self._arguments.inplace else result


def _prepare_result(
    returned: Any, topk_ids: Tensor, topk_weights: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """What ``prepare`` returned, with the layer's ids and weights where it gave none."""
    if not isinstance(returned, tuple) or len(returned) not in (3, 5) or not isinstance(returned[0], Tensor):
        given = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(
            "prepare must return (hidden_states, scale, expert_num_tokens) or a compile_moe.PrepareResult, "
            f"got {given}"
        )
    result = PrepareResult(*returned)
    return (
        *result[:3],
        topk_ids if result.topk_ids is None else result.topk_ids,
        topk_weights if result.topk_weights is None else result.topk_weights,
    )
