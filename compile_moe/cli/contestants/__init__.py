"""What ``compile-moe bench`` times: a model's layer with each experts implementation of transformers, our experts in
each quantization scheme, and the expert kernels of other libraries, one file each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from compile_moe.cli.contestants import quantized, scattermoe, sonicmoe, triton_kernels, vllm
from compile_moe.cli.contestants.contestant import Contestant
from compile_moe.cli.contestants.expert_weights import ExpertWeights, weights_of
from compile_moe.cli.contestants.transformers_experts import NAMES, contestant_of
from compile_moe.cli.moe_layer import MoELayer, experts_of

#: Other libraries, which compute the experts alone.
PEERS: dict[str, Callable[[ExpertWeights], Contestant]] = {
    "vllm": vllm.make,
    "sonicmoe": sonicmoe.make,
    "scattermoe": scattermoe.make,
    "triton_kernels": triton_kernels.make,
}
#: What computes the experts alone: ours in each quantization scheme, too.
EXPERTS_ONLY: dict[str, Callable[[ExpertWeights], Contestant]] = {
    **{scheme: functools.partial(quantized.make, scheme) for scheme in quantized.NAMES},
    **PEERS,
}
CONTESTANTS = (*NAMES, *EXPERTS_ONLY)


def make_contestant(name: str, layer: MoELayer, is_block: bool) -> Contestant:
    """The contestant called ``name``; one that computes the experts alone copies the weights into its own layout.

    Raises:
        Unavailable: a peer that is not installed, or that can't compute these experts.
    """
    if name in EXPERTS_ONLY:
        return EXPERTS_ONLY[name](weights_of(experts_of(layer)))
    return contestant_of(name, layer, is_block)
