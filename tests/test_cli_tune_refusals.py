"""What ``compile-moe tune`` refuses before it measures anything."""

from __future__ import annotations

import pytest
import torch

from tests.support.command import tune_command as invoke


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "tune times kernels on a CUDA device, but got --device cpu"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["--tokens", "few"], "must be numbers separated by commas, got few"),
        (["--skew", "-1"], "--skew must be at least 0 (all experts as likely) and finite, got -1.0"),
        (["--topk", "2"], "a shape of your own needs --hidden-size"),
        (["--topk", "2", "--model", "mixtral-8x7b"], "--model or a shape of your own, not both"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_refusals(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: tune times kernels on a CUDA device, but torch {torch.__version__} sees no CUDA device here; "
        "run it on the machine whose tiles you want\n"
    )
