"""Why passes left something alone, for those who want to explain a graph."""

from __future__ import annotations

import threading
from collections import UserList
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 100


class _Rehearsals(threading.local):
    running = False


_rehearsals = _Rehearsals()


class Refusals(threading.local, UserList[str]):
    """Reasons in the order in which they were found. Each thread sees those of its own compiles."""

    def refuse(self, reason: str) -> None:
        if not _rehearsals.running:
            self.append(reason)
            del self[:-_MOST]


@contextmanager
def rehearsal() -> Iterator[None]:
    """Nothing is recorded in the body: what it does is done again."""
    _rehearsals.running = True
    try:
        yield
    finally:
        _rehearsals.running = False
