"""The modular MoE kernel: prepare, experts and finalize as exchangeable parts.

Names, signatures and contracts are those of the published modular-kernel interface; what differs is listed in each
docstring.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compile_moe.activations import ActivationLike, call_activation, resolve_activation
from compile_moe.ops import _moe_problem_size, act_and_mul
from compile_moe.ops.fused_moe import check_call
from compile_moe.ops.problem_size import require, require_optional_tensors, require_tensors, shape

__all__ = [
    "FusedMoEModularKernel",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEPrepareAndFinalize",
    "PrepareResult",
    "_moe_problem_size",
]


class PrepareResult(NamedTuple):
    """What ``prepare`` may return instead of the published 3-tuple.

    topk_ids and topk_weights are those of the dispatched rows, where dispatch changed them (None: as given): the
    experts and a ``reduce`` see these, a published ``finalize`` the layer's own.
    """

    hidden_states: Tensor
    scale: Tensor | None = None
    expert_num_tokens: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None


class FusedMoEPrepareAndFinalize(ABC):
    """First and last step of the layer: quantize and dispatch the tokens; combine, weight and reduce the results."""

    #: Functional form of ``finalize``: (fused_expert_output, topk_weights, topk_ids, expert_map, num_experts,
    #: apply_router_weight_on_input) -> (M, K), ignoring slots that topk_ids and expert_map skip (topk_ids None: no
    #: slot). The kernel uses it where ``finalize`` is the very function that it names as its counterpart.
    reduce: Callable[..., Tensor] | None = None
    reduce_counterpart: Callable[..., None] | None = None

    @abstractmethod
    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None] | PrepareResult:
        """Quantize and dispatch the layer's input.

        Args:
            a1: (M, K), unquantized.
            a1_scale: scales for a1, or None.
            a2_scale: scales of the second GEMM's input, or None; both GEMMs must be quantized alike.
            topk_weights, topk_ids: (M, topk).
            num_experts: number of experts in the global id space.
            expert_map: (num_experts,), global to local ids, -1 where not local; or None.
            apply_router_weight_on_input: weight the tokens here, before quantization and dispatch.

        Returns:
            Dispatched tokens, their scales or None, and the tokens of each expert (batched format only) or None; or
            a :class:`PrepareResult`.
        """

    @abstractmethod
    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Combine the experts' results into ``output``.

        Args:
            output: (M, K), written in place. Filled with zeros, unless the layer runs in place: then it is
                hidden_states.
            fused_expert_output: (M, topk, K), unweighted and unreduced; zeros in slots that nobody computed.
            topk_weights, topk_ids: (M, topk), as given to the layer.
            apply_router_weight_on_input: True: the weights were applied already.
        """


class FusedMoEPermuteExpertsUnpermute(ABC):
    """Middle step of the layer: permute tokens to experts, both expert GEMMs with the activation, unpermute."""

    #: ``apply``, but it may leave slots that nobody computed unwritten, for a ``reduce`` that ignores them; it
    #: allocates what it needs, and gets empty workspaces. The kernel uses it where ``apply`` is the very function
    #: that it names as its counterpart.
    apply_unfilled: Callable[..., Tensor] | None = None
    apply_unfilled_counterpart: Callable[..., Tensor] | None = None

    @property
    def overrides_activation(self) -> bool:
        """Whether ``activation`` is somebody else's: the experts must then call it between the GEMMs."""
        return not _is_method(self.activation, FusedMoEPermuteExpertsUnpermute.activation)

    @abstractmethod
    def workspace_shapes(
        self, a: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        """Elements of workspace13 (shared by the results of both GEMMs) and of workspace2 (activation), and a dtype.

        Args:
            a: the layer's input (before dispatch).
            M, N, K, topk: the problem size; num_experts: experts in the global id space.
        """

    def activation(self, activation: ActivationLike, output: Tensor, input: Tensor) -> None:
        """Apply the activation to ``input`` (..., N), writing ``output`` (..., I).

        Raises:
            ValueError: unknown activation, or an output of another shape.
        """
        resolved = resolve_activation(activation, input.size(-1), input)
        if resolved.function is None:
            result = act_and_mul(input, resolved.epilogue)
        else:
            result = call_activation(resolved.function, input, output.size(-1))
        if result.shape != output.shape:
            raise ValueError(
                f"activation of {shape(input)} gives {shape(result)}, but output is {shape(output)}"
            )
        output.copy_(result)

    @abstractmethod
    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: ActivationLike,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        """Run the experts on prepared tokens.

        Args:
            hidden_states: (M, K) from ``prepare``.
            w1: (E, N, K), w2: (E, K, I).
            topk_ids: (M, topk), dispatched.
            activation: as given to the layer.
            global_num_experts, expert_map: as given to the layer.
            w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale: scales and zero points, or None.
            workspace13, workspace2: zero-filled scratch of ``workspace_shapes``'s sizes; the result may lie there.
            expert_num_tokens: (E,), tokens of each expert in the batched format, else None.

        Returns:
            (M, topk, K), unweighted and unreduced; finite zeros in slots that nobody computes.
        """


class FusedMoEModularKernel(torch.nn.Module):
    """One MoE layer from a prepare/finalize part and an experts part.

    Differs from the published class: the built-in parts allocate no workspaces, and where both parts are built in,
    skipped slots are masked in the reduction instead of being filled with zeros. Parts may hold state of their layer:
    use one kernel a layer.
    """

    def __init__(
        self,
        prepare_finalize: FusedMoEPrepareAndFinalize,
        fused_experts: FusedMoEPermuteExpertsUnpermute,
    ) -> None:
        super().__init__()
        if not isinstance(prepare_finalize, FusedMoEPrepareAndFinalize):
            raise TypeError(
                f"prepare_finalize must be a FusedMoEPrepareAndFinalize, got {type(prepare_finalize).__name__}"
            )
        if not isinstance(fused_experts, FusedMoEPermuteExpertsUnpermute):
            raise TypeError(
                f"fused_experts must be a FusedMoEPermuteExpertsUnpermute, got {type(fused_experts).__name__}"
            )
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts

    def forward(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        inplace: bool = False,
        activation: ActivationLike = "silu",
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w1_zp: Tensor | None = None,
        w2_zp: Tensor | None = None,
        a1_scale: Tensor | None = None,
        a2_scale: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (M, K).
            w1: (E, N, K), N = 2I where the activation is gated, else I. w2: (E, K, I).
            topk_weights: (M, topk), floating point. topk_ids: (M, topk), int32 or int64; negative ids, ids that
                expert_map sends to -1, and the id global_num_experts skip their slot.
            inplace: write the result into hidden_states and return it.
            activation: name, :class:`compile_moe.Activation`, or callable gate_up (..., N) -> (..., I).
            global_num_experts: size of the id space; -1 for w1's number of experts, or expert_map's length.
            expert_map: (global_num_experts,), global to local ids, -1 where not local.
            w1_scale, w2_scale, w1_zp, w2_zp, a1_scale, a2_scale: for experts classes that handle them.
            apply_router_weight_on_input: weight the input instead of the outputs; topk must be 1.

        Returns:
            (M, K) in hidden_states' dtype. Under autocast in the autocast dtype, as torch's GEMMs, where a built-in
            class finalizes out of place.

        Raises:
            ValueError, TypeError: arguments that don't fit together.
        """
        require_tensors(
            hidden_states=hidden_states, w1=w1, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids
        )
        require_optional_tensors(expert_map=expert_map)
        # No more than what holds for every format of weights: the experts check theirs.
        check_call(hidden_states, w1, w2, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)
        E, M, N, K, topk = _moe_problem_size(hidden_states, w1, w2, topk_ids)
        if global_num_experts == -1:
            global_num_experts = E if expert_map is None else expert_map.size(0)
        experts, parts = self.fused_experts, self.prepare_finalize
        # Overridden on a subclass, a mixin or an instance: then the shortcut doesn't speak for it.
        has_unfilled = _is_method(experts.apply, type(experts).apply_unfilled_counterpart)
        has_reduce = _is_method(parts.finalize, type(parts).reduce_counterpart)

        # As published, buffers exist before prepare, and hold zeros.
        output = None
        if not has_reduce:
            output = hidden_states if inplace else torch.zeros_like(hidden_states)
        size13, size2, workspace_dtype = 0, 0, hidden_states.dtype
        if not has_unfilled:
            size13, size2, workspace_dtype = experts.workspace_shapes(
                hidden_states, M, N, K, topk, global_num_experts
            )
        workspace13 = hidden_states.new_zeros(size13, dtype=workspace_dtype)
        workspace2 = hidden_states.new_zeros(size2, dtype=workspace_dtype)

        a1q, a1q_scale, expert_num_tokens, ids, weights = _prepare_result(
            parts.prepare(
                hidden_states,
                a1_scale,
                a2_scale,
                topk_weights,
                topk_ids,
                global_num_experts,
                expert_map,
                apply_router_weight_on_input,
            ),
            topk_ids,
            topk_weights,
        )
        unfilled = has_unfilled and has_reduce
        apply = experts.apply_unfilled if unfilled else experts.apply
        fused_out = apply(  # type: ignore[misc]
            a1q,
            w1,
            w2,
            ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            w1_scale=w1_scale,
            w2_scale=w2_scale,
            w1_zp=w1_zp,
            w2_zp=w2_zp,
            a1q_scale=a1q_scale,
            a2_scale=a2_scale,
            workspace13=workspace13,
            workspace2=workspace2,
            expert_num_tokens=expert_num_tokens,
        )
        if output is not None:
            parts.finalize(output, fused_out, topk_weights, topk_ids, apply_router_weight_on_input)
            return output
        mask = (ids, expert_map, E) if unfilled else (None, None, -1)
        if not unfilled:
            expected = (ids.size(0), topk, K)
            require(
                tuple(fused_out.shape) == expected,
                lambda: f"apply must return (M, topk, K) = {expected}, got {shape(fused_out)}",
            )
            fused_out = fused_out.to(hidden_states.dtype)
        result = parts.reduce(  # type: ignore[misc]
            fused_out, weights, *mask, apply_router_weight_on_input
        )
        require(
            tuple(result.shape) == (M, K),
            lambda: (
                f"reduce must return (M, K) = {(M, K)}, got {shape(result)}; where prepare dispatches other rows, "
                "finalize must bring them back: override it"
            ),
        )
        return hidden_states.copy_(result) if inplace else result


def _is_method(method: Callable[..., Any], function: Callable[..., Any] | None) -> bool:
    """Whether a bound method is that of ``function``."""
    if function is None:
        return False
    # Not getattr with a default, nor hasattr: dynamo (torch 2.13) gives the default, though there is a __func__.
    try:
        return method.__func__ is function  # type: ignore[attr-defined]
    except AttributeError:  # no bound method
        return False


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
