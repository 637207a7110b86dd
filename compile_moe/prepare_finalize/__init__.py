"""First and last steps of the layer."""

from compile_moe.prepare_finalize.all_gather import AllGatherPrepareAndFinalize
from compile_moe.prepare_finalize.all_to_all import AllToAllPrepareAndFinalize
from compile_moe.prepare_finalize.batched import BatchedPrepareAndFinalize
from compile_moe.prepare_finalize.batched_all_to_all import BatchedAllToAllPrepareAndFinalize
from compile_moe.prepare_finalize.no_expert_parallel import MoEPrepareAndFinalizeNoEP
from compile_moe.prepare_finalize.tensor_parallel import TensorParallelPrepareAndFinalize

__all__ = [
    "AllGatherPrepareAndFinalize",
    "AllToAllPrepareAndFinalize",
    "BatchedAllToAllPrepareAndFinalize",
    "BatchedPrepareAndFinalize",
    "MoEPrepareAndFinalizeNoEP",
    "TensorParallelPrepareAndFinalize",
]
