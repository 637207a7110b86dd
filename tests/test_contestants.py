"""The adapters of other libraries: given modules with the same signatures, whether layouts and arguments are right."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from compile_moe.cli import timing
from compile_moe.cli.contestants import PEERS, make_contestant
from compile_moe.cli.contestants.contestant import Unavailable
from compile_moe.cli.contestants.expert_weights import weights_of
from compile_moe.cli.measurement import Bench
from compile_moe.cli.moe_layer import MoELayer, custom_configuration, experts_of, make_layer
from compile_moe.cli.timing import Ceilings
from tests.support.fake_peers import INSTALL, Peer, install_vllm, silu

pytestmark = pytest.mark.usefixtures("no_grad_short_timing")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")


@pytest.fixture
def no_grad_short_timing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(timing, "_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with torch.no_grad():
        yield


def layer_of(model: str, dtype: torch.dtype = torch.bfloat16) -> MoELayer:
    if model in ("qwen", "gelu"):
        config = custom_configuration(64, 32, 8, 2)
        config.hidden_act = {"qwen": "silu", "gelu": "gelu"}[model]
        return make_layer(config, "eager", CPU, dtype)
    # swigluoai, biases, gate and up alternating, weights stored transposed
    options = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
    layer = make_layer(transformers.GptOssConfig(**options), "eager", CPU, dtype)
    if model == "biased silu":
        experts_of(layer).__dict__["_apply_gate"] = silu
    return layer


def bench_of(layer: MoELayer) -> Bench:
    return Bench(layer, False, Ceilings(1e12, 1e11))


@pytest.mark.parametrize("model", ["qwen", "biased silu", "gpt-oss"])
@pytest.mark.parametrize("name", PEERS)
def test_layouts_and_arguments(monkeypatch: pytest.MonkeyPatch, name: str, model: str) -> None:
    if (name, model) == ("sonicmoe", "gpt-oss"):
        pytest.skip("computes silu only")
    peer = Peer([], torch.zeros(()))
    INSTALL[name](monkeypatch, peer)
    bench = bench_of(layer_of(model))
    contestant = make_contestant(name, bench.layer, False)
    for tokens in (1, 5):
        measured = bench.measure(name, contestant, tokens)
        assert measured.failure == "" and measured.error is not None and measured.error < 2e-2
        assert measured.microseconds is not None and measured.floor is not None
    # Weights are brought into their layout once, not in what is timed: each product sees one address.
    assert len(set(peer.weights)) == (1 if name in ("vllm", "sonicmoe") else 2)


@pytest.mark.parametrize("name", PEERS)
def test_one_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    INSTALL[name](monkeypatch, Peer([], torch.tensor(0.1)))
    bench = bench_of(layer_of("qwen"))
    measured = bench.measure(name, make_contestant(name, bench.layer, False), 5)
    assert measured.failure.startswith("wrong result, by ") and measured.microseconds is None


def test_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "scattermoe"):
        INSTALL[name](monkeypatch, Peer([], torch.zeros(())))
        bench = bench_of(layer_of("qwen", torch.float32))
        measured = bench.measure(name, make_contestant(name, bench.layer, False), 3)
        assert measured.failure == "" and measured.error is not None and measured.error < 1e-5


@pytest.mark.parametrize(
    ("name", "model", "dtype", "message"),
    [
        ("sonicmoe", "gpt-oss", torch.bfloat16, "computes silu; this model's activation is swigluoai"),
        (
            "sonicmoe",
            "qwen",
            torch.float32,
            "computes bfloat16 and float16, got float32; choose another --dtype",
        ),
        (
            "triton_kernels",
            "gelu",
            torch.bfloat16,
            "computes silu and swigluoai; this model's activation is gelu",
        ),
        ("triton_kernels", "qwen", torch.float32, "computes bfloat16 and float16, got float32"),
    ],
)
def test_what_a_library_cannot_compute(
    monkeypatch: pytest.MonkeyPatch, name: str, model: str, dtype: torch.dtype, message: str
) -> None:
    INSTALL[name](monkeypatch, Peer([], torch.zeros(())))
    with pytest.raises(Unavailable) as failure:
        make_contestant(name, layer_of(model, dtype), False)
    assert str(failure.value).startswith(message)


def test_activation_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install_vllm(monkeypatch, Peer([], torch.zeros(())))
    layer = layer_of("qwen")
    experts_of(layer).__dict__["_apply_gate"] = lambda gate_up: silu(gate_up) + 1
    with pytest.raises(Unavailable, match="this model's activation is none that has a name"):
        make_contestant("vllm", layer, False)


@pytest.mark.parametrize(
    ("model", "activation"),
    [("qwen", "silu"), ("gelu", "gelu"), ("gpt-oss", "swigluoai"), ("biased silu", "silu")],
)
def test_weights_of_a_model(model: str, activation: str) -> None:
    weights = weights_of(experts_of(layer_of(model)))
    assert weights.activation == activation
    assert (weights.w1.shape, weights.w2.shape) == ((8, 64, 64), (8, 64, 32))
    assert (weights.w1_bias is None) is (model in ("qwen", "gelu"))


@pytest.mark.parametrize("name", PEERS)
def test_not_installed(name: str) -> None:
    with pytest.raises(Unavailable, match=r"^not installed; install it by: pip install "):
        make_contestant(name, layer_of("qwen"), False)


def test_import_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    layer = layer_of("qwen")
    monkeypatch.setattr("importlib.import_module", fails)
    with pytest.raises(Unavailable, match=r"can't be imported: OSError: libcuda"):
        make_contestant("vllm", layer, False)


def test_other_package_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("triton_kernels")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "triton_kernels", package)
    with pytest.raises(
        Unavailable, match=r"triton_kernels.matmul can't be imported: No module named .* brings it"
    ):
        make_contestant("triton_kernels", layer_of("qwen"), False)
