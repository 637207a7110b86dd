"""One contestant measured at one number of tokens: correct first, then its time, host time, kernels and memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from compile_moe.cli import kernel_count
from compile_moe.cli.bench_results import HostTime, Measurement, Work
from compile_moe.cli.contestants import make_contestant
from compile_moe.cli.contestants.contestant import Contestant, Inputs, Unavailable
from compile_moe.cli.contestants.expert_weights import weights_of
from compile_moe.cli.contestants.transformers_experts import NAMES, REFERENCE, contestant_of, using
from compile_moe.cli.host_time import measure_host_time
from compile_moe.cli.language_model import one_line
from compile_moe.cli.moe_layer import MoELayer, experts_of
from compile_moe.cli.refusal import Refusal
from compile_moe.cli.timing import Ceilings, host_seconds, seconds_per_call

T = TypeVar("T")

#: Inputs of each number of tokens, with other routing, so that the weights don't stay in the cache.
_NUM_INPUTS = 8
#: Largest error that a contestant may have against transformers' eager experts, relative, in the L2 norm of a token.
MOST_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class Bench:
    """A layer on a device, and the ceilings of that device."""

    def __init__(self, layer: MoELayer, is_block: bool, ceilings: Ceilings) -> None:
        self.layer = layer
        self.experts = experts_of(layer)
        self.is_block = is_block
        self.ceilings = ceilings
        weight = self.experts.down_proj
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self.num_experts: int = weight.size(0)
        self.reference = contestant_of(REFERENCE, layer, is_block)

    def enter(self, name: str) -> Contestant | str:
        """The contestant called ``name``, or why there is none; nothing compiled for an earlier one is left."""
        torch._dynamo.reset()
        return attempt(lambda: make_contestant(name, self.layer, self.is_block))

    def measure(self, name: str, contestant: Contestant, tokens: int) -> Measurement:
        """The numbers of a contestant, or why there are none."""
        with using(self.layer, name if name in NAMES else REFERENCE):
            result = attempt(lambda: self._measure(name, contestant, tokens))
        return (
            Measurement(name, self.num_experts, tokens, failure=result) if isinstance(result, str) else result
        )

    def host_times(self, numbers: Sequence[int]) -> Iterator[HostTime]:
        """The host's share of eager calls of ours, at each number of tokens."""
        for tokens in numbers:
            found = attempt(functools.partial(self._host_time, tokens))
            yield HostTime(self.num_experts, tokens, failure=found) if isinstance(found, str) else found

    def _host_time(self, tokens: int) -> HostTime:
        return measure_host_time(weights_of(self.experts), self.inputs(tokens, 0))

    def _measure(self, name: str, contestant: Contestant, tokens: int) -> Measurement:
        on_gpu = self.device.type == "cuda"
        inputs = [self.inputs(tokens, seed) for seed in range(_NUM_INPUTS)]
        arguments = [contestant.arguments(i) for i in inputs]
        heading = name, self.num_experts, tokens
        error = self._error(contestant, inputs, arguments)
        if not error <= (contestant.most_error or MOST_ERROR[self.dtype]):
            return Measurement(*heading, error=error, failure=f"wrong result, by {error:.1e}")
        calls = [lambda taken=taken: contestant.call(*taken) for taken in arguments]
        memory = peak(calls[0], self.device) if on_gpu else None
        kernels = tuple(kernel_count.gpu_kernels(calls[0], self.device)) if on_gpu else None
        host = host_seconds(calls[0], self.device) * 1e6 if on_gpu else None
        replayed = on_gpu and contestant.replayable
        microseconds = seconds_per_call(calls, self.device, replayed, warm=True) * 1e6
        work = None if self.is_block else self._work(inputs, contestant.expert_bytes)
        floor = None if work is None else work.floor(self.ceilings.of(name))
        return Measurement(*heading, microseconds, replayed, host, kernels, memory, error, work, floor)

    def inputs(self, tokens: int, seed: int) -> Inputs:
        """Random tokens with random routing."""
        generator = torch.Generator(self.device).manual_seed(1000 + seed)
        random: dict[str, Any] = {"device": self.device, "generator": generator}
        hidden_size = self.layer.norm.normalized_shape[0]
        topk = self.experts.config.num_experts_per_tok
        hidden_states = torch.randn(tokens, hidden_size, dtype=self.dtype, **random)
        ids = torch.rand(tokens, self.num_experts, **random).topk(topk).indices
        weights = torch.rand(tokens, topk, **random)
        return Inputs(hidden_states, ids, (weights / weights.sum(-1, keepdim=True)).to(self.dtype))

    def _error(
        self, contestant: Contestant, inputs: Sequence[Inputs], arguments: Sequence[tuple[Any, ...]]
    ) -> float:
        """Relative error of what is timed against its reference: of the worst token, where the routing is given. A
        block may route some to other experts where two are about as good: of it, the median of the tokens.
        """
        errors = []
        for given, taken in zip(inputs, arguments, strict=True):
            if contestant.reference is not None:
                expected = self._added(contestant.reference(*taken), given)
            else:
                with using(self.layer, REFERENCE):
                    expected = self._added(self.reference.call(*self.reference.arguments(given)), given)
            result = self._added(contestant.call(*taken), given)
            errors.append((result - expected).norm(dim=-1) / expected.norm(dim=-1))
        all_errors = torch.cat(errors)
        return float(all_errors.median() if self.is_block else all_errors.max())

    def _added(self, result: Any, inputs: Inputs) -> Tensor:
        """What the experts added to the tokens, float32."""
        return result[0].float() - inputs.hidden_states.float() if self.is_block else result.float()

    def _work(self, inputs: Sequence[Inputs], expert_bytes: int | None) -> Work:
        hidden_states, ids, _ = inputs[0]
        elements = sum(p[0].numel() for p in self.experts.parameters() if p.dim() == 3)
        hit = sum(float(i.ids.unique().numel()) for i in inputs) / len(inputs)
        itemsize = hidden_states.element_size()
        weights = hit * (elements * itemsize if expert_bytes is None else expert_bytes)
        return Work(2 * ids.numel() * elements, weights + 2 * hidden_states.numel() * itemsize)


def attempt(work: Callable[[], T]) -> T | str:
    """What ``work`` returns, or why it can't.

    Raises:
        Refusal: options that can't work.
    """
    try:
        return work()
    except Refusal:
        raise
    except Unavailable as error:
        return str(error)
    except torch.OutOfMemoryError:
        failure = "out of memory"
    except Exception as error:  # what a library or the compiler can't do
        failure = f"{type(error).__name__}: {one_line(error)[:200]}"
    # Behind the handlers: the error holds the tensors of its frames.
    torch.cuda.empty_cache()
    return failure


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call has allocated at its peak, over what was there before and over its result."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    output = torch.cuda.memory_allocated(device) - before
    del result
    return torch.cuda.max_memory_allocated(device) - before - output
