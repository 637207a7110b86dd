"""Commands of the command line, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from compile_moe.cli import app


def tune_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments], env={"COLUMNS": "200"})
