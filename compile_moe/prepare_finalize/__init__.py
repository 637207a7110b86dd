"""First and last steps of the layer."""

from compile_moe.prepare_finalize.batched import BatchedPrepareAndFinalize
from compile_moe.prepare_finalize.no_expert_parallel import MoEPrepareAndFinalizeNoEP

__all__ = ["BatchedPrepareAndFinalize", "MoEPrepareAndFinalizeNoEP"]
