"""Expert parallelism by all-to-all with exact sizes: a token travels once to each rank that has experts of its."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_moe.ops.weight_and_reduce import weight_and_reduce
from compile_moe.prepare_finalize.collectives import all_to_all, as_sizes, wait
from compile_moe.prepare_finalize.expert_parallel import ExpertParallelPrepareAndFinalize
from compile_moe.prepare_finalize.token_rows import TokenRows


class WayBack(NamedTuple):
    """How results return.

    num_sent, num_received: rows to and from each rank, at dispatch. rows: (M, n) int64, a token's rows among those that
    it sent; is_sent: (M, n), whether they are; n is the most ranks that a token can go to.
    """

    num_sent: list[int]
    num_received: list[int]
    rows: Tensor
    is_sent: Tensor


class AllToAllPrepareAndFinalize(ExpertParallelPrepareAndFinalize):
    """Each token to the ranks of its experts, and from each of these one row back: its weighted sum there.

    A token that goes to d ranks (at most topk; its own counts, too, but stays in memory) sends d rows, of K elements in
    the tokens' dtype (quantized where the scheme quantizes tokens) and 8 * topk + 4 * G bytes (ids, weights, G scales),
    and gets d rows of K elements in the results' dtype, which are summed in float32. Token counts may differ among
    ranks, and be zero.

    The ranks exchange the numbers of rows, for which the host waits once a call: this can't be captured in a CUDA
    graph. A compiled graph holds the numbers as unbacked sizes, one graph for all routings; that needs
    ``fullgraph=True`` or ``torch._dynamo.config.capture_scalar_outputs = True``, else the graph breaks there.

    Args:
        placement: the experts of each rank of the group; w1, w2 and their scales are this rank's.
        group: a ``torch.distributed.ProcessGroup``, or None for the default group.
        quant_config: how the experts want their tokens quantized, or None. Quantized tokens are sent as such, each with
            its scale. A computed scale per tensor is that of the sending rank's tokens.
        device: where the tokens are; None for the current CUDA device where the group's backend is NCCL, else the CPU.
        tensor_parallel_size: t, ranks that share the experts of one rank of the placement: ranks t * r … t * r + t - 1
            of the group have, of each expert of rank r, 1 / t of the intermediate size, as
            :class:`TensorParallelPrepareAndFinalize` describes it. Their results are summed on the way back, too.

    Attributes:
        expert_map: (num_experts,) int32 on ``device``: pass it to the layer's call.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError, TypeError: a placement for another number of ranks, or arguments of other kinds.
    """

    def dispatch(self, rows: TokenRows) -> tuple[Callable[[], TokenRows], WayBack]:
        size, share = self.group.size, self.tensor_parallel_size
        ids = rows.topk_ids
        m, topk = ids.shape
        # Each rank starts at another copy of a replicated expert.
        ranks = self.owner_tables.owners(ids, first_token=self.rank_of_experts)
        # Ids beyond the last are this rank's own affair: its experts raise.
        ranks = torch.where(ids > self.num_experts, self.rank_of_experts, ranks)

        # Rows in the order of (receiver, token).
        receivers = torch.arange(size, device=ids.device)
        is_sent = (ranks == (receivers // share).view(size, 1, 1)).any(-1)
        places = is_sent.flatten().cumsum(0).view(size, m) - 1
        num_sent, num_received = self._exchange_sizes(is_sent.sum(1))
        total = sum(num_sent)
        # What isn't sent goes to a place behind the last.
        places_or_last = torch.where(is_sent, places, total).flatten()
        names = torch.arange(m, device=ids.device) * size + receivers.unsqueeze(1)
        sent = names.new_zeros(total + 1).scatter(0, places_or_last, names.flatten()).narrow(0, 0, total)
        tokens, receiver = sent // size, (sent % size).unsqueeze(1)
        outgoing = TokenRows(
            _take(rows.hidden_states, tokens),
            torch.where(_take(ranks, tokens) == receiver // share, _take(ids, tokens), -1),
            _take(rows.topk_weights, tokens),
            None if rows.scale is None else _take(rows.scale, tokens),
        )
        arrived = outgoing.sent(lambda tensors: all_to_all(tensors, num_sent, num_received, self.group))

        if size <= topk * share:
            own_rows, is_own = places.t(), is_sent.t()
        else:
            shares = torch.arange(share, device=ids.device)
            computing = (ranks.clamp(min=0).unsqueeze(2) * share + shares).flatten(1)
            own_rows, is_own = places.t().gather(1, computing), _is_first(ranks).repeat_interleave(share, 1)
        return arrived, WayBack(num_sent, num_received, torch.where(is_own, own_rows, 0), is_own)

    def combine(self, partial: Tensor, way_back: WayBack) -> Callable[[], Tensor]:
        num_sent, num_received, rows, is_sent = way_back
        started = all_to_all([partial], num_received, num_sent, self.group)

        def summed() -> Tensor:
            (returned,) = wait(started)
            if torch.compiler.is_compiling() or returned.size(0) == 0:
                returned = _with_row(returned)
            # The experts' weights are applied already; a row that wasn't sent is a skipped slot.
            ids = torch.where(is_sent, 0, -1)
            ones = torch.ones_like(rows, dtype=torch.float32)
            return weight_and_reduce(returned[rows], ones, ids, None, 1, False)

        return summed

    def _exchange_sizes(self, num_sent: Tensor) -> tuple[list[int], list[int]]:
        size = self.group.size
        each = [1] * size
        (num_received,) = wait(all_to_all([num_sent], each, each, self.group))
        sizes = as_sizes(torch.cat([num_sent, num_received]))
        return sizes[:size], sizes[size:]


def _take(t: Tensor, rows: Tensor) -> Tensor:
    """Rows of a tensor (M, n); one-byte types as bytes, which every device can index."""
    bits = t.view(torch.uint8) if t.itemsize == 1 else t
    if _is_known_empty(t):
        # Inductor refuses to take rows of a tensor without any, however many.
        bits = _with_row(bits)
    return bits[rows].view(t.dtype)


def _is_known_empty(t: Tensor) -> bool:
    """Whether t has no rows, False where only the run can tell."""
    empty = t.size(0) == 0
    if isinstance(empty, bool) and not torch.compiler.is_dynamo_compiling():
        return empty
    # Here, because it costs half a second; with symbols, it is there.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(empty))


def _with_row(t: Tensor) -> Tensor:
    """(M, n) with a row more, so that row 0 exists. In a graph nothing is copied: it becomes a bound of the gather."""
    return F.pad(t, (0, 0, 0, 1))


def _is_first(ranks: Tensor) -> Tensor:
    """Whether a slot (M, topk) is its token's first for its rank; False for no rank."""
    topk = ranks.size(1)
    earlier = torch.ones(topk, topk, dtype=torch.bool, device=ranks.device).tril(-1)
    repeats = ((ranks.unsqueeze(2) == ranks.unsqueeze(1)) & earlier).any(-1)
    return (ranks >= 0) & ~repeats
