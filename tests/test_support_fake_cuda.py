"""Inductor's GPU code can be read without a GPU."""

import re

import pytest
import torch

from tests.support.fake_cuda import cuda_empty, generated_kernels

NORM_WEIGHT = (64,)


def _residual_norm(x, residual, weight):
    h = x + residual
    return torch.nn.functional.rms_norm(h, NORM_WEIGHT, weight) * 2


def _arguments():
    return [cuda_empty(16, 64), cuda_empty(16, 64), cuda_empty(64)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_pointwise_and_norm_are_one_kernel(dynamic):
    dims = [(0, 0), (1, 0)] if dynamic else []
    generated = generated_kernels(_residual_norm, _arguments, dims)
    assert len(generated.triton_kernels) == 1
    assert generated.extern_calls == generated.op_calls == []
    assert ("xnumel = 16" in generated.code) != dynamic


def test_one_kernel_for_unbacked_dimension():
    # Pointwise only: inductor doesn't fuse a reduction with what follows it over unbacked sizes.
    def scaled(x, weight):
        return torch.relu(x * 2) * weight

    generated = generated_kernels(
        scaled, lambda: [cuda_empty(16, 64), cuda_empty(64)], unbacked_dims=[(0, 0)]
    )
    assert len(generated.triton_kernels) == 1
    assert re.search(r"\bu\d+\b", generated.code)


def test_extern_calls_are_listed_in_order():
    def mlp(x, w1, w2):
        return torch.relu(x @ w1) @ w2

    generated = generated_kernels(mlp, lambda: [cuda_empty(16, 64), cuda_empty(64, 64), cuda_empty(64, 64)])
    assert generated.extern_calls == ["extern_kernels.mm", "extern_kernels.mm"]
    assert len(generated.triton_kernels) == 1


def test_config_is_passed_on():
    generated = generated_kernels(_residual_norm, _arguments, triton__descriptive_names=False)
    assert "rms_norm" not in generated.triton_kernels[0]


def test_failure_to_compile_is_raised():
    def broken(x):
        return x @ x.new_empty(3, 3)

    with pytest.raises(Exception, match=r"64|shape|size"):
        generated_kernels(broken, lambda: [cuda_empty(16, 64)])


def test_the_process_knows_no_gpu_afterwards():
    before = torch.cuda.is_available(), torch.cuda.device_count()
    generated_kernels(_residual_norm, _arguments)
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == before
    compiled = torch.compile(lambda x: x.sin() + 1, fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3).sin() + 1)
