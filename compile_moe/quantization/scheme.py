"""What a quantization scheme is, and the registry of schemes.

A scheme with its parameters has a canonical text, such as ``int4_w4a16(group_size=128)``: the ``str`` argument of the
ops.
"""

from __future__ import annotations

import ast
import functools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from compile_moe.quantization.decoding import to_float32
from compile_moe.quantization.token_scaling import TokenScaling


class QuantizedWeights(NamedTuple):
    """A stack of expert matrices in a scheme's layout."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Scheme(ABC):
    """A format of weights (E, N, K), with scales along K, and how the tokens that meet them are quantized.

    ``quantize`` and ``dequantize`` work on any leading dimensions, (E, N, K) and one expert's (N, K) alike. Sizes
    passed as N and K are those of the unquantized matrix.
    """

    name: ClassVar[str]
    #: dtype of the stored weights, and how many of them one element holds (along K).
    weight_dtype: ClassVar[torch.dtype]
    packed: ClassVar[int] = 1
    #: How many rows share an element of the zero points.
    packed_zero_points: ClassVar[int] = 1
    #: How the shape of the scales reads in errors.
    scale_layout: ClassVar[str]
    #: Accepted dtypes of the scales; None accepts the activations' dtype and float32.
    scale_dtype: ClassVar[torch.dtype | None] = torch.float32
    #: Triton function from stored numbers (uint8: a byte each, or a nibble) to float32, before zero point and scale,
    #: for zero points, too; None where tokens are quantized, and multiplied by the weights as both are stored.
    decode: ClassVar[Any] = None
    #: Triton function (codes, DTYPE) from stored bytes to the tokens' DTYPE, float16 or bfloat16, with the results of
    #: ``decode``, exactly; of low and high nibbles where two are packed. It is used where scales multiply sums or are
    #: stored in DTYPE, and where they are ``powers_of_two`` for bfloat16 only. None where there is none.
    decode_16_bits: ClassVar[Any] = None
    #: The same, four bytes at a time: those of bytes 0, 2, 1, 3. For the kernels of few rows; None leaves few rows to
    #: the others.
    decode_words: ClassVar[Any] = None
    #: The same of words of four bytes, each given twice, so that a pair gives two numbers of 16 bits: of bytes 0 and 2,
    #: and of 1 and 3. For the kernels of one token; None leaves it to the others. Where tokens are quantized, it
    #: decodes these as well, to float16 only, which must hold both exactly.
    decode_registers: ClassVar[Any] = None
    #: The same of words with two neighbouring numbers each, bytes or nibbles, given twice: these two. For many rows on
    #: Hopper; None leaves those to the others.
    decode_pairs: ClassVar[Any] = None
    #: Whether scales are powers of two, of float32's range.
    powers_of_two: ClassVar[bool] = False
    #: Triton function from stored scales to float32; those stored as floating point it must leave as they are.
    decode_scale: ClassVar[Any] = to_float32
    #: (scales, DTYPE), where one of these two is used, from those not stored in DTYPE.
    decode_scale_16_bits: ClassVar[Any] = None

    @property
    def text(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)}' for f in fields(self))})"

    @property
    def token_scaling(self) -> TokenScaling | None:
        """How tokens are quantized; None leaves them in their dtype."""
        return None

    @property
    def scale_block(self) -> tuple[int, int | None]:
        """Rows and columns that share a scale and a zero point; None for all columns. Any number of rows may share a
        scale whose shape has no rows.
        """
        return 1, None

    @property
    def column_multiple(self) -> int:
        """What K must be a multiple of."""
        return self.packed

    @property
    def other_columns(self) -> str:
        """What to do where K is no such multiple, for errors."""
        return "; use another group size" if hasattr(self, "group_size") else ""

    @abstractmethod
    def scale_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of (num_experts, n, k)."""

    def zero_point_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...] | None:
        """Shape of the zero points, uint8; None where the scheme has none."""
        return None

    def weight_shape(self, num_experts: int, n: int, k: int) -> tuple[int, ...]:
        return num_experts, n, k // self.packed

    @abstractmethod
    def quantize(self, w: Tensor, zero_points: bool, scale_dtype: torch.dtype) -> QuantizedWeights:
        """Quantize float32 weights; see each class for its formula."""

    @abstractmethod
    def dequantize(
        self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """(..., N, K), computed in ``dtype``: float32 or float64."""


SCHEMES: dict[str, type[Scheme]] = {}
S = TypeVar("S", bound=type[Scheme])


def register(scheme: S) -> S:
    """Class decorator: make a scheme known by its name."""
    SCHEMES[scheme.name] = scheme
    return scheme


def make_scheme(name: str, **parameters: Any) -> Scheme:
    """A scheme by its name and those of its parameters that are not None.

    Raises:
        ValueError: no such scheme, no such parameter, or a parameter out of range.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(sorted(SCHEMES))}, got {name!r}")
    scheme = SCHEMES[name]
    known = [f.name for f in fields(scheme)]
    given = {key: value for key, value in parameters.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            takes = f"takes {', '.join(known)}" if known else "takes no parameters"
            raise ValueError(f"scheme {name} {takes}, got {key}={value!r}; leave it out")
    return scheme(**given)


@functools.lru_cache(1000)
def parse_scheme(text: str) -> Scheme:
    """The scheme of a canonical text."""
    match = re.fullmatch(r"(\w+)\((.*)\)", text)
    if match is None:
        raise ValueError(f"scheme must read NAME(PARAMETER=VALUE, ...), got {text!r}")
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    return make_scheme(match[1], **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
