"""The error a command ends with when what it was given can't work, and the writing of files, which may be that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Refusal(Exception):
    """One line for the user: what was given, what is accepted. The command prints it and exits with status 2."""


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Refuse an option whose file can't be written."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"{option} {path} can't be written: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: an interruption must not take what was there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
