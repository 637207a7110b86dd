"""Every op over one list of inputs: opcheck, fake equals real, ``.out`` overloads, autograd's refusal."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from tests.support.op_inputs import OP_CASES, STAGES, stage_inputs
from tests.support.oracle import make_layer

#: Ops on integers, which have no gradient.
SORTS = ("sort_tokens", "sort_batch")
OUT_STAGES = [s for s in STAGES if s != "fused_moe"]


def op(name: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(torch.ops.compile_moe, name).default
    return overload


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck(case: str, stage: str, device: str) -> None:
    arguments = stage_inputs(make_layer(**OP_CASES[case], device=device))[stage]
    torch.library.opcheck(op(stage), arguments)


@pytest.mark.parametrize("case", OP_CASES)
def test_opcheck_in_place(case: str, device: str) -> None:
    arguments = stage_inputs(make_layer(**OP_CASES[case], device=device))["fused_moe"]
    torch.library.opcheck(torch.ops.compile_moe.fused_moe_.default, arguments)


@pytest.mark.parametrize("stage", OUT_STAGES)
@pytest.mark.parametrize("case", ["plain", "M0", "odd", "skipped"])
def test_out_overload(case: str, stage: str, device: str) -> None:
    arguments = stage_inputs(make_layer(**OP_CASES[case], device=device))[stage]
    expected = op(stage)(*arguments)
    expected = expected if isinstance(expected, tuple) else (expected,)
    overload = getattr(torch.ops.compile_moe, stage).out
    names = [a.name for a in overload._schema.arguments if a.alias_info is not None]
    outs = {name: torch.full_like(e, 77) for name, e in zip(names, expected, strict=True)}
    assert overload(*arguments, **outs) is None
    for out, e in zip(outs.values(), expected, strict=True):
        torch.testing.assert_close(out, e, rtol=0, atol=0)
    torch.library.opcheck(overload, arguments, outs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", OP_CASES)
def test_fake_equals_real(case: str, stage: str, device: str) -> None:
    arguments = stage_inputs(make_layer(**OP_CASES[case], device=device))[stage]
    real = op(stage)(*arguments)
    with FakeTensorMode() as mode:
        fake = op(stage)(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    real, fake = (r if isinstance(r, tuple) else (r,) for r in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in SORTS])
def test_backward_names_the_op_and_the_way_out(stage: str, device: str) -> None:
    arguments = list(stage_inputs(make_layer(device=device))[stage])
    arguments[0] = arguments[0].clone().requires_grad_()
    out = op(stage)(*arguments)
    # Ids and slots have no gradient; weights do.
    out = out[0] if isinstance(out, tuple) else out
    assert out.requires_grad, "the op detached silently"
    named = "weight_and_reduce" if stage == "fused_moe" else stage
    with pytest.raises(NotImplementedError, match=rf"compile_moe::{named} .*torch\.no_grad\(\)"):
        out.sum().backward()


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in SORTS])
def test_forward_mode_is_refused(stage: str, device: str) -> None:
    arguments = list(stage_inputs(make_layer(device=device))[stage])
    refused = pytest.raises(
        NotImplementedError, match=r"compile_moe::\w+ has no backward .*torch\.no_grad\(\)"
    )
    with forward_ad.dual_level():
        arguments[0] = forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0]))
        with refused:
            op(stage)(*arguments)
    with refused:
        torch.func.jvp(
            lambda x: op(stage)(x, *arguments[1:]), (arguments[0],), (torch.ones_like(arguments[0]),)
        )


@pytest.mark.parametrize("stage", [s for s in STAGES if s not in SORTS])
def test_functional_gradients_are_refused(stage: str, device: str) -> None:
    arguments = list(stage_inputs(make_layer(device=device))[stage])

    def total(x: torch.Tensor) -> torch.Tensor:
        out = op(stage)(x, *arguments[1:])
        return (out[0] if isinstance(out, tuple) else out).sum()

    with pytest.raises(NotImplementedError, match=r"compile_moe::\w+ has no backward .*torch\.no_grad\(\)"):
        torch.func.grad(total)(arguments[0])


@pytest.mark.parametrize("stage", [s for s in OUT_STAGES if s not in SORTS])
def test_out_overload_refuses_grad(stage: str, device: str) -> None:
    arguments = list(stage_inputs(make_layer(device=device))[stage])
    results = op(stage)(*arguments)
    overload = getattr(torch.ops.compile_moe, stage).out
    names = [a.name for a in overload._schema.arguments if a.alias_info is not None]
    results = results if isinstance(results, tuple) else (results,)
    outs = {name: torch.empty_like(result) for name, result in zip(names, results, strict=True)}
    arguments[0] = arguments[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=rf"compile_moe::{stage}\.out .*torch\.no_grad\(\)"):
        overload(*arguments, **outs)
    with torch.no_grad():
        overload(*arguments, **outs)


def test_out_overload_checks_its_buffer(device: str) -> None:
    gate_up, epilogue = stage_inputs(make_layer(device=device))["act_and_mul"]
    overload = torch.ops.compile_moe.act_and_mul.out
    for out in (
        gate_up.new_empty(1, 1),
        gate_up.new_empty(gate_up.size(0), gate_up.size(1) // 2, dtype=torch.float64),
        gate_up.new_empty(gate_up.size(1) // 2, gate_up.size(0)).t(),
    ):
        with pytest.raises(ValueError, match=r"out must be .*, got"):
            overload(gate_up, epilogue, out=out)
