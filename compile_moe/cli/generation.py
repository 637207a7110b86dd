"""Greedy generation with a static cache: its tokens, its logits, its speed."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_REPETITIONS = 3

Forward = Callable[..., Any]


class Generation(NamedTuple):
    """Greedy tokens (list of T), and the logits behind them and behind the prompt: (S + T - 1, V) float32 on CPU."""

    tokens: list[int]
    logits: Tensor


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


class Difference(NamedTuple):
    """Where two generations part: the token's position (from 0), both tokens, and by how much the first generation's
    logits prefer its own."""

    position: int
    tokens: tuple[int, int]
    gap: float


class Comparison(NamedTuple):
    """Of two generations: their first difference or None, the largest difference of logits, the largest logit."""

    difference: Difference | None
    max_error: float
    max_logit: float


class Generator:
    """A model's cache and prompt.

    One cache serves all runs: it is allocated by an eager forward, because the compiled one must find its memory in
    place, and reset before each run.
    """

    def __init__(self, model: Any, prompt: Tensor, max_new_tokens: int) -> None:
        from transformers import StaticCache

        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        # past_key_values in transformers 5.17, cache in 5.24.
        names = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.size(1) + max_new_tokens)
        self.prefill(model)

    def prefill(self, forward: Forward) -> Tensor:
        """Logits of the prompt, (S, V); afterwards the cache holds the prompt."""
        self.cache.reset()
        return self.step(forward, self.prompt)

    def step(self, forward: Forward, ids: Tensor) -> Tensor:
        """Logits (S, V) of the next S tokens, ids (1, S)."""
        # Under reduce-overhead the next call overwrites what this one returns.
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = forward(ids, **{self.cache_name: self.cache}, use_cache=True).logits
        return logits[0].clone()

    def generate(self, forward: Forward) -> Generation:
        """Greedy tokens and all logits."""
        logits = [self.prefill(forward)]
        tokens = [logits[0][-1:].argmax(-1)]
        while len(tokens) < self.max_new_tokens:
            logits.append(self.step(forward, tokens[-1][None]))
            tokens.append(logits[-1].argmax(-1))
        return Generation(torch.cat(tokens).tolist(), torch.cat(logits).float().cpu())

    def speed(self, forward: Forward) -> Speed:
        """Medians of some runs; ``forward`` must have run before."""
        seconds_prefill, seconds_decode = [], []
        for _ in range(_REPETITIONS):
            start = self._now()
            ids = self.prefill(forward)[-1:].argmax(-1)
            middle = self._now()
            for _ in range(self.max_new_tokens - 1):
                ids = self.step(forward, ids[None]).argmax(-1)
            seconds_prefill.append(middle - start)
            seconds_decode.append(self._now() - middle)
        return Speed(
            self.prompt.size(1) / statistics.median(seconds_prefill),
            (self.max_new_tokens - 1) / statistics.median(seconds_decode),
        )

    def _now(self) -> float:
        if self.prompt.is_cuda:
            torch.cuda.synchronize(self.prompt.device)
        return time.perf_counter()


def compare(expected: Generation, given: Generation) -> Comparison:
    """Tokens up to the first that differs, and logits as far as both saw the same tokens."""
    difference = None
    num_prompt_logits = len(expected.logits) - len(expected.tokens)
    comparable = len(expected.logits)
    for index, tokens in enumerate(zip(expected.tokens, given.tokens, strict=True)):
        if tokens[0] != tokens[1]:
            row = expected.logits[num_prompt_logits + index]
            difference = Difference(index, tokens, (row[tokens[0]] - row[tokens[1]]).item())
            comparable = num_prompt_logits + index + 1
            break
    error = (expected.logits[:comparable] - given.logits[:comparable]).abs().max().item()
    return Comparison(difference, error, expected.logits[:comparable].abs().max().item())
