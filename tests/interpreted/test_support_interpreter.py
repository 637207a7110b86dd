"""The repaired interpreter agrees with torch on what kernels of this library use."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

N = 16


def _launch(kernel, *arguments, **constants):
    kernel[(1,)](*arguments, **constants)


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, k, N: tl.constexpr, STEP: tl.constexpr):
    lane = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for first in range(0, tl.cdiv(k, STEP)):
        inner = first * STEP + tl.arange(0, STEP)
        a = tl.load(a_ptr + lane[:, None] * k + inner[None, :], mask=(inner < k)[None, :], other=0.0)
        b = tl.load(b_ptr + inner[:, None] * N + lane[None, :], mask=(inner < k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(out_ptr + lane[:, None] * N + lane[None, :], acc.to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot_over_a_runtime_bound(dtype):
    a, b, out = (
        torch.randn(N, 40, dtype=dtype),
        torch.randn(40, N, dtype=dtype),
        torch.empty(N, N, dtype=dtype),
    )
    _launch(_dot, a, b, out, 40, N=N, STEP=16)
    expected = a.double() @ b.double()
    torch.testing.assert_close(out.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x, y = tl.load(x_ptr + lane), tl.load(y_ptr + lane)
    result = tl.where(x > y, x * y + 2.0, -x / y)
    result = tl.clamp(result, -3.0, 3.0)
    tl.store(out_ptr + lane, tl.minimum(tl.maximum(result, x - y), tl.abs(y)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic_rounds_after_each_operation(dtype):
    x, y, out = (torch.randn(N).to(dtype) for _ in range(3))
    _launch(_arithmetic, x, y, out, N=N)
    expected = torch.where(x > y, x * y + 2.0, (-x.float() / y.float()).to(dtype)).clamp(-3, 3)
    expected = torch.minimum(torch.maximum(expected, x - y), y.abs())
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@triton.jit
def _cast(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]


CASTS = [
    (source, target)
    for source, target in itertools.permutations([*FLOATS, torch.int32], 2)
    # Kernels cast to and from float8 through wider floats only.
    if source.itemsize > 1 or (target.itemsize > 1 and target.is_floating_point)
    if target.itemsize > 1 or source.is_floating_point
]


@pytest.mark.parametrize(("source", "target"), CASTS, ids=str)
def test_casts_as_torch(source, target):
    x, out = (torch.randn(64) * 100).to(source), torch.empty(64, dtype=target)
    _launch(_cast, x, out, N=64)
    assert torch.equal(out.float(), x.to(target).float())


@triton.jit
def _extern(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x, y = tl.load(x_ptr + lane), tl.load(y_ptr + lane)
    tl.store(out_ptr + lane, libdevice.tanh(x))
    tl.store(out_ptr + N + lane, libdevice.expm1(x))
    tl.store(out_ptr + 2 * N + lane, libdevice.log1p(y))
    tl.store(out_ptr + 3 * N + lane, libdevice.pow(y, x))
    tl.store(out_ptr + 4 * N + lane, libdevice.fmod(x, y))
    tl.store(out_ptr + 5 * N + lane, libdevice.floor(x))
    tl.store(out_ptr + 6 * N + lane, libdevice.erf(x))
    tl.store(out_ptr + 7 * N + lane, libdevice.pow(y, 2.5))
    tl.store(out_ptr + 8 * N + lane, libdevice.rsqrt(y))
    tl.store(out_ptr + 9 * N + lane, libdevice.rint(x))
    tl.store(out_ptr + 10 * N + lane, libdevice.fma(x, y, x))
    tl.store(out_ptr + 11 * N + lane, libdevice.trunc(x))


def test_libdevice():
    x, y, out = torch.randn(N) * 3, torch.rand(N) + 0.5, torch.empty(12, N)
    _launch(_extern, x, y, out, N=N)
    expected = [
        torch.tanh(x),
        torch.expm1(x),
        torch.log1p(y),
        y**x,
        torch.fmod(x, y),
        x.floor(),
        torch.erf(x),
    ]
    expected += [y**2.5, y.rsqrt(), x.round(), x * y + x, x.trunc()]
    torch.testing.assert_close(out, torch.stack(expected))


@triton.jit
def _whole_block(x_ptr, index_ptr, out_ptr, sums_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x, index = tl.load(x_ptr + lane), tl.load(index_ptr + lane)
    tl.store(out_ptr + lane, tl.gather(x, index, 0))
    tl.store(out_ptr + N + lane, tl.histogram(index, N))
    tl.store(out_ptr + 2 * N + lane, tl.cumsum(x, 0))
    tl.store(out_ptr + 3 * N + lane, tl.sort(x))
    tl.store(out_ptr + 4 * N + lane, tl.flip(x, 0))
    tl.store(sums_ptr, tl.sum(x, 0))
    tl.store(sums_ptr + 1, tl.max(x, 0))
    tl.store(sums_ptr + 2, tl.argmax(x, 0))


def test_operations_over_a_block():
    x = torch.randperm(100)[:N].to(torch.int32)
    index = torch.randint(0, N, (N,), dtype=torch.int32)
    out, sums = torch.empty(5, N, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    _launch(_whole_block, x, index, out, sums, N=N)
    expected = [x[index.long()], index.bincount(minlength=N), x.cumsum(0), x.sort().values, x.flip(0)]
    assert torch.equal(out, torch.stack([e.to(torch.int32) for e in expected]))
    assert sums.tolist() == [x.sum(), x.max(), x.argmax()]


@triton.jit
def _sum(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.sum(tl.load(x_ptr + lane[:, None] * N + lane[None, :]), 1))


def test_sum_of_bfloat16():
    x, out = torch.randn(N, N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.bfloat16)
    _launch(_sum, x, out, N=N)
    torch.testing.assert_close(out, x.sum(1), rtol=2**-7, atol=2**-7)


@triton.jit
def _copy(x_ptr, out_ptr, count, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane, mask=lane < count), mask=lane < count)


def test_out_of_bounds_raises():
    _launch(_copy, torch.empty(5), torch.empty(5), 5, N=N)
    with pytest.raises(Exception, match="load outside every argument: 1 of 6"):
        _launch(_copy, torch.empty(5), torch.empty(6), 6, N=N)
    with pytest.raises(Exception, match="store outside every argument: 2 of 8"):
        _launch(_copy, torch.empty(8), torch.empty(6), 8, N=N)
    _launch(_copy, torch.empty(0), torch.empty(0), 0, N=N)
    with pytest.raises(Exception, match="load outside every argument: 2 of 2"):
        _launch(_copy, torch.empty(0), torch.empty(2), 2, N=N)


@triton.jit
def _copy_backwards(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.load(x_ptr - lane))


def test_address_before_an_argument_raises():
    with pytest.raises(Exception, match="load outside every argument"):
        _launch(_copy_backwards, torch.empty(N), torch.empty(N), N=N)


@triton.jit
def _extrema(x_ptr, out_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(x_ptr + lane)
    tl.store(out_ptr + lane, tl.maximum(x, 0.0))
    tl.store(out_ptr + N + lane, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


def test_nan_propagates_on_request_only():
    x, out = torch.full((N,), torch.nan), torch.empty(2, N)
    _launch(_extrema, x, out, N=N)
    assert (out[0] == 0).all()
    assert out[1].isnan().all()


@triton.jit
def _double(x):
    return x * 2


@triton.jit
def _apply(x_ptr, out_ptr, FUNCTION: tl.constexpr, N: tl.constexpr):
    lane = tl.arange(0, N)
    x = tl.load(x_ptr + lane)
    first, second = FUNCTION(x), x
    tl.store(out_ptr + lane, first + second)


def test_function_as_constant():
    x, out = torch.randn(N), torch.empty(N)
    _launch(_apply, x, out, FUNCTION=_double, N=N)
    torch.testing.assert_close(out, x * 3)


@triton.jit
def _unrolled(out_ptr, start, end):
    total = 0
    for i in tl.range(start, end, 4, loop_unroll_factor=2):
        total += i
    tl.store(out_ptr, total)


def test_unrolled_loops_do_not_run_backwards():
    out = torch.zeros(1, dtype=torch.int32)
    _launch(_unrolled, out, 4, 12)
    assert out.item() == 4 + 8
    _launch(_unrolled, out, 4, 1)
    assert out.item() == 0
    with pytest.raises(triton.runtime.errors.InterpreterError, match="can't be unrolled"):
        _launch(_unrolled, out, 8, 1)


@triton.jit
def _sort(x_ptr, out_ptr, N: tl.constexpr, DESCENDING: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out_ptr + lane, tl.sort(tl.load(x_ptr + lane), descending=DESCENDING))


@pytest.mark.parametrize("descending", [False, True])
def test_sort(descending):
    x, out = torch.randint(-(2**31), 2**31, (N,), dtype=torch.int32), torch.empty(N, dtype=torch.int32)
    _launch(_sort, x, out, N=N, DESCENDING=descending)
    assert torch.equal(out, x.sort(descending=descending).values)
