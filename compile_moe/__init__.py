"""compile_moe: fused Mixture-of-Experts layers that torch.compile sees through."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compile_moe import integrations, routers
from compile_moe.activations import Activation
from compile_moe.checkpoints import repack_awq, repack_compressed_tensors, repack_gptq
from compile_moe.expert_placement import ExpertPlacement
from compile_moe.experts import BatchedTorchExperts, BatchedTritonExperts, TorchExperts, TritonExperts
from compile_moe.fused_experts import fused_experts
from compile_moe.modular_kernel import (
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    PrepareResult,
    _moe_problem_size,
)
from compile_moe.ops.registry import on_fake_call
from compile_moe.parallelize import parallelize
from compile_moe.prepare_finalize import (
    AllGatherPrepareAndFinalize,
    AllToAllPrepareAndFinalize,
    BatchedAllToAllPrepareAndFinalize,
    BatchedPrepareAndFinalize,
    MoEPrepareAndFinalizeNoEP,
    TensorParallelPrepareAndFinalize,
)
from compile_moe.quant_config import FusedMoEQuantConfig
from compile_moe.quantize_weights import dequantize_weights, quantize_weights
from compile_moe.warm_up import warm_up

if TYPE_CHECKING:
    from compile_moe.lowering.explain import Explanation

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "AllGatherPrepareAndFinalize",
    "AllToAllPrepareAndFinalize",
    "BatchedAllToAllPrepareAndFinalize",
    "BatchedPrepareAndFinalize",
    "BatchedTorchExperts",
    "BatchedTritonExperts",
    "ExpertPlacement",
    "FusedMoEModularKernel",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEPrepareAndFinalize",
    "FusedMoEQuantConfig",
    "MoEPrepareAndFinalizeNoEP",
    "PrepareResult",
    "TensorParallelPrepareAndFinalize",
    "TorchExperts",
    "TritonExperts",
    "_moe_problem_size",
    "dequantize_weights",
    "explain",
    "fused_experts",
    "integrations",
    "parallelize",
    "quantize_weights",
    "repack_awq",
    "repack_compressed_tensors",
    "repack_gptq",
    "routers",
    "warm_up",
]


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile ``function`` for these arguments and say which kernels it has: see
    :func:`compile_moe.lowering.explain.explain`.
    """
    from compile_moe.lowering.explain import explain

    return explain(function, *args, **kwargs)


def _register_lowerings() -> None:
    import compile_moe.lowering

    compile_moe.lowering.register()


on_fake_call(_register_lowerings)
