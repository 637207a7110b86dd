"""Quantization schemes: formats of weights and of the tokens they meet, one file a scheme in ``schemes/``.

Below the ops, importing nothing else of this package: these describe shapes and dtypes, quantize and dequantize in
plain PyTorch, and name the Triton functions by which the kernels dequantize. A file in ``schemes/`` that registers a
class is all that a scheme needs.
"""

import importlib
import pkgutil

from compile_moe.quantization import schemes
from compile_moe.quantization.scheme import SCHEMES, QuantizedWeights, Scheme, make_scheme, parse_scheme
from compile_moe.quantization.token_scaling import TokenScaling, parse_scaling

for _module in pkgutil.iter_modules(schemes.__path__):
    importlib.import_module(f"{schemes.__name__}.{_module.name}")

__all__ = [
    "SCHEMES",
    "QuantizedWeights",
    "Scheme",
    "TokenScaling",
    "make_scheme",
    "parse_scaling",
    "parse_scheme",
]
