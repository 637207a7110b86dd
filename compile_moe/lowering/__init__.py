"""What inductor makes of the ops: lowerings of those that it can fuse, and passes over its graphs."""

if __name__ != "compile_moe.lowering":
    raise ImportError(
        f"compile_moe's lowerings were imported as {__name__!r}; import them as 'compile_moe.lowering', or they would "
        "be registered twice"
    )


def register() -> None:
    """Register all lowerings, and put the passes where inductor finds them. Imports inductor.

    Called again and again: others may have replaced the passes since, for good or for one compile.
    """
    from compile_moe.lowering import (
        act_and_mul,
        graph_passes,
        quantize_tokens,
        reduce_batch,
        weight_and_reduce,
    )
    from compile_moe.lowering.fusion_warning import warn_once
    from compile_moe.lowering.inductor_compat import missing_for_fusion

    act_and_mul.register()
    weight_and_reduce.register()
    reduce_batch.register()
    quantize_tokens.register()
    graph_passes.register()
    reasons = missing_for_fusion()
    if reasons:
        warn_once("inductor", "; ".join(reasons))
