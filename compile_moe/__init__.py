"""compile_moe: fused Mixture-of-Experts layers that torch.compile sees through."""

from compile_moe import integrations, routers
from compile_moe.activations import Activation
from compile_moe.experts import TorchExperts, TritonExperts
from compile_moe.fused_experts import fused_experts
from compile_moe.modular_kernel import (
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    PrepareResult,
    _moe_problem_size,
)
from compile_moe.ops.registry import on_fake_call
from compile_moe.prepare_finalize import MoEPrepareAndFinalizeNoEP
from compile_moe.warm_up import warm_up

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "FusedMoEModularKernel",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEPrepareAndFinalize",
    "MoEPrepareAndFinalizeNoEP",
    "PrepareResult",
    "TorchExperts",
    "TritonExperts",
    "_moe_problem_size",
    "fused_experts",
    "integrations",
    "routers",
    "warm_up",
]


def _register_lowerings() -> None:
    import compile_moe.lowering

    compile_moe.lowering.register()


on_fake_call(_register_lowerings)
