"""The warning that something is not fused because of what inductor is, or of a bug of ours; results are right."""

from __future__ import annotations

import threading
import warnings


class FusionWarning(UserWarning):
    """Compiled code is right, but runs more kernels than it should. In this library's tests it is an error."""


_warned: set[str] = set()
_lock = threading.RLock()


def warn_once(key: str, message: str) -> None:
    """Warn once in this process for each ``key``."""
    with _lock:
        if key not in _warned:
            warnings.warn(f"compile_moe: {message}", FusionWarning, stacklevel=3)
            # Not before: where the warning is an error, the next one is, too.
            _warned.add(key)
