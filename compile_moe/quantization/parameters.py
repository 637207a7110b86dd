"""Checks of schemes' parameters."""

from __future__ import annotations


def check_size(scheme: str, name: str, value: object, multiple: int = 1) -> None:
    """Raise ValueError unless a group or block size is a positive multiple."""
    if type(value) is not int or value < 1 or value % multiple:
        kind = "a positive int" if multiple == 1 else f"a positive multiple of {multiple}"
        raise ValueError(f"{name} of scheme {scheme} must be {kind}, got {value!r}")


def check_block_shape(scheme: str, value: object) -> None:
    """Raise ValueError unless a block shape is a pair of positive ints."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(type(v) is int and v >= 1 for v in value):
        raise ValueError(
            f"block_shape of scheme {scheme} must be a tuple of two positive ints, got {value!r}"
        )
