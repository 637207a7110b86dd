"""Inductor lowerings of the ops that inductor can fuse: activation and finalize."""

if __name__ != "compile_moe.lowering":
    raise ImportError(
        f"compile_moe's lowerings were imported as {__name__!r}; import them as 'compile_moe.lowering', or they would "
        "be registered twice"
    )


def register() -> None:
    """Register all lowerings; again and again is harmless. Imports inductor."""
    from compile_moe.lowering import act_and_mul, weight_and_reduce

    act_and_mul.register()
    weight_and_reduce.register()
