"""Tensor parallelism inside experts: each rank has a part of every expert's intermediate size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compile_moe.modular_parts import FusedMoEPrepareAndFinalize, is_method
from compile_moe.prepare_finalize.collectives import all_reduce, find_group, wait
from compile_moe.prepare_finalize.without_backward import needing_gradients, without_backward


class TensorParallelPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Another prepare/finalize part for ranks that have the same tokens, and each a part of every expert.

    Of I intermediate sizes, each of R ranks has I / R: the same rows of gate and of up in its w1, (E, 2I / R, K), and
    the columns of w2 that belong to them, (E, K, I / R). w1_bias is cut as w1; a w2_bias is given to one rank's experts
    only. Scales and zero points are cut where what they belong to is; a rank quantizes its part of a token's second
    input by itself. In finalize the ranks' results are summed, by an all-reduce of (M, K) in hidden_states' dtype: the
    same result on each. Where ranks have tokens of their own, see ``tensor_parallel_size`` of
    :class:`AllGatherPrepareAndFinalize` and :class:`AllToAllPrepareAndFinalize`.

    Args:
        prepare_finalize: one of this library's parts; among ranks with different experts, one whose group has the ranks
            with the same part of experts.
        group: a ``torch.distributed.ProcessGroup`` of the ranks with the same experts and tokens, or None for the
            default group.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: a part with a finalize of the user's own, which can't know that its result is one rank's part: let it
            sum over the ranks itself, before it writes ``output``.

    Example:
        >>> parts = TensorParallelPrepareAndFinalize(MoEPrepareAndFinalizeNoEP())             # doctest: +SKIP
        >>> layer = FusedMoEModularKernel(parts, TritonExperts())                             # doctest: +SKIP
        >>> gate, up = w1.chunk(2, 1)                                                         # doctest: +SKIP
        >>> own = slice(rank * I // size, (rank + 1) * I // size)                             # doctest: +SKIP
        >>> own_w1, own_w2 = torch.cat([gate[:, own], up[:, own]], 1), w2[:, :, own]          # doctest: +SKIP
        >>> layer(hidden_states, own_w1, own_w2, topk_weights, topk_ids)                      # doctest: +SKIP
    """

    def __init__(self, prepare_finalize: FusedMoEPrepareAndFinalize, group: Any = None) -> None:
        parts = prepare_finalize
        if not isinstance(parts, FusedMoEPrepareAndFinalize):
            raise TypeError(
                f"prepare_finalize must be a FusedMoEPrepareAndFinalize, got {type(parts).__name__}"
            )
        if not is_method(parts.finalize, type(parts).reduce_counterpart):
            raise TypeError(
                f"prepare_finalize must be a part with the library's own finalize, got {type(parts).__name__} with "
                "another; sum over the ranks in that finalize, before it writes output"
            )
        self.prepare_finalize = parts
        self.group = find_group(group)
        self.reduces_batches = parts.reduces_batches
        self.experts_of_rank = parts.experts_of_rank

    def prepare(self, *arguments: Any, **options: Any) -> Any:
        """The part's."""
        return self.prepare_finalize.prepare(*arguments, **options)

    def prepare_async(self, *arguments: Any, **options: Any) -> Callable[[], Any]:
        """The part's, where it has one; else its ``prepare``, whole."""
        parts = self.prepare_finalize
        if is_method(parts.prepare, type(parts).prepare_async_counterpart):
            return parts.prepare_async(*arguments, **options)  # type: ignore[misc]
        prepared = parts.prepare(*arguments, **options)
        return lambda: prepared

    prepare_async_counterpart = prepare

    def finalize(self, output: Tensor, *arguments: Any, **options: Any) -> None:
        """The part's, of all ranks."""
        self.prepare_finalize.finalize(output, *arguments, **options)
        sources = needing_gradients(output)
        started = all_reduce(output, self.group)
        output.copy_(without_backward(lambda: wait(started)[0], sources)())

    def reduce(self, *arguments: Any, **options: Any) -> Tensor:
        """``finalize`` as a function."""
        return self.reduce_async(*arguments, **options)()

    def reduce_async(self, *arguments: Any, **options: Any) -> Callable[[], Tensor]:
        """``reduce``, but for the wait until the sums are here, which the returned function does."""
        partial = self.prepare_finalize.reduce(*arguments, **options)  # type: ignore[misc]
        started = all_reduce(partial, self.group)
        return without_backward(lambda: wait(started)[0], needing_gradients(partial))

    reduce_counterpart = finalize
    reduce_async_counterpart = reduce
