"""The two parts of a modular MoE kernel that users may write: prepare/finalize, and experts.

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
from compile_moe.ops import act_and_mul
from compile_moe.ops.problem_size import require, shape


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
    #: ``prepare`` and ``reduce`` in two steps, where there is something to wait for: what they start is awaited by the
    #: function that they return, which gives what ``prepare`` and ``reduce`` give. The kernel uses them where
    #: ``prepare`` and ``reduce`` are the very functions that they name as their counterparts.
    prepare_async: Callable[..., Callable[[], Any]] | None = None
    prepare_async_counterpart: Callable[..., Any] | None = None
    reduce_async: Callable[..., Callable[[], Tensor]] | None = None
    reduce_async_counterpart: Callable[..., Tensor] | None = None
    #: Whether ``reduce`` takes the experts' results as a batch (E, max_num_tokens, K) instead of (M, topk, K).
    reduces_batches: bool = False
    #: How many experts this rank has by a placement, which w1 and w2 must hold; None where there is none.
    experts_of_rank: int | None = None

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
            fused_expert_output: (M, topk, K), unweighted and unreduced; zeros in slots that nobody computed. In the
                batched format (E, max_num_tokens, K), where rows without a token hold anything.
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
        return not is_method(self.activation, FusedMoEPermuteExpertsUnpermute.activation)

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
            hidden_states: (M, K) from ``prepare``, or in the batched format (E, max_num_tokens, K).
            w1: (E, N, K), w2: (E, K, I).
            topk_ids: (M, topk), dispatched.
            activation: as given to the layer.
            global_num_experts, expert_map: as given to the layer.
            w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale: scales and zero points, or None.
            workspace13, workspace2: zero-filled scratch of ``workspace_shapes``'s sizes; the result may lie there.
            expert_num_tokens: (E,), tokens of each expert in the batched format, else None.

        Returns:
            (M, topk, K), unweighted and unreduced; finite zeros in slots that nobody computes. In the batched format
            (E, max_num_tokens, K), where rows without a token may be left unwritten.
        """


def write_result(output: Tensor, result: Tensor) -> None:
    """What a ``finalize`` does with what its ``reduce`` gives.

    Raises:
        ValueError: an output of another shape.
    """
    require(
        output.shape == result.shape,
        lambda: f"output must be (M, K) = {shape(result)}, got {shape(output)}",
    )
    output.copy_(result)


def is_method(method: Callable[..., Any], function: Callable[..., Any] | None) -> bool:
    """Whether a bound method is that of ``function``."""
    if function is None:
        return False
    # Not getattr with a default, nor hasattr: dynamo (torch 2.13) gives the default, though there is a __func__.
    try:
        return method.__func__ is function  # type: ignore[attr-defined]
    except AttributeError:  # no bound method
        return False
