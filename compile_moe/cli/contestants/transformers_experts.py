"""A model's own classes with an experts implementation of transformers, ours among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import compile_moe.integrations.transformers as integration
from compile_moe.cli.contestants.contestant import Contestant, Inputs
from compile_moe.cli.moe_layer import MoELayer, experts_of

#: What the results of all others are compared with.
REFERENCE = "eager"
NAMES = (integration.NAME, "grouped_mm", "batched_mm", REFERENCE)


def contestant_of(name: str, layer: MoELayer, is_block: bool) -> Contestant:
    """The layer, or its experts alone, with the experts called ``name``; compiled, unless they are eager.

    It computes with the implementation that :func:`using` has chosen.
    """
    module: nn.Module = layer if is_block else experts_of(layer)

    def arguments(inputs: Inputs) -> tuple[Tensor, ...]:
        """One compile serves all numbers of tokens but one."""
        taken = inputs[:1] if is_block else tuple(inputs)
        if inputs.hidden_states.size(0) > 1:
            for argument in taken:
                torch._dynamo.mark_dynamic(argument, 0)
        return taken

    if name == REFERENCE:  # reads on the host which expert has tokens
        return Contestant(arguments, module, replayable=False)
    return Contestant(arguments, torch.compile(module, fullgraph=True))


@contextmanager
def using(layer: MoELayer, name: str) -> Iterator[None]:
    """Let the layer's experts compute with the implementation called ``name``."""
    config = experts_of(layer).config
    before = config._experts_implementation
    config._experts_implementation = name
    try:
        yield
    finally:
        config._experts_implementation = before
