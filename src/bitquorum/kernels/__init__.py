"""Run the inner loops of the stochastic quantizer, plainly or fused by a compiler.

| file | holds |
|---|---|
| `choice` | the choice between plain and compiled code, and the call of a compiled kernel |
| `layout` | views of a tensor in the order of its memory, so that no layout costs a copy |
| `noise` | counter-based uniform noise, and the draw of a code |
| `mean` | slope and curvature of the mean code |
| `concrete` | slope of a drawn code's concrete relaxation |
| `quantize` | draw, decoding and both derivatives in one pass each |
| `rounding` | weights rounded to nearest, forwards and backwards in one pass each |
| `normalize` | batch normalization whose second derivatives are one pass each |
| `gelu` | GELU whose second derivatives are one pass |
| `precision` | half precision widened, and chosen where it pays |
| `convolution` | convolutions whose second derivatives cost what the first ones do |

A kernel is one pure torch function. Plainly it runs block by block inside the cache; compiled, `torch.compile` fuses it
into one pass (inductor: C++ on a CPU, Triton on CUDA; see `bitquorum benchmark`). Compilation takes some seconds
for each kernel in the first process and less in the next, so plain code is the default:

    >>> from bitquorum import kernels
    >>> kernels.mode()
    'eager'
    >>> with kernels.use("eager"):
    ...     pass

The noise bits are integers and equal in both; a code differs where the last place of a logarithm moves a value across
a rounding threshold, in less than one draw of 100,000. Two calls give equal bits, in either. Compiled code takes
float32 and, where a network trains in it, bfloat16; every other type runs plainly.
"""

from bitquorum.kernels.choice import Mode, applies, compiler_available, mode, use
from bitquorum.kernels.concrete import LEAST, relaxed_slope
from bitquorum.kernels.convolution import CHANNEL_BLOCK, convolve, fits_convolution, memory_format
from bitquorum.kernels.gelu import fits_gelu, gelu
from bitquorum.kernels.layout import flatten, unflatten
from bitquorum.kernels.mean import SmoothLawName, fits, slope, slope_and_curvature
from bitquorum.kernels.noise import LawName, draw, keys, mix64, uniform
from bitquorum.kernels.normalize import fits_normalization, normalize, normalize_plain, statistics_held
from bitquorum.kernels.precision import bfloat16_pays, wide
from bitquorum.kernels.quantize import (
    MeanCode,
    Noise,
    expect,
    fits_expectation,
    fits_quantization,
    quantize,
    round_nearest,
)
from bitquorum.kernels.rounding import round_symmetric

__all__ = [
    "CHANNEL_BLOCK",
    "LEAST",
    "LawName",
    "MeanCode",
    "Mode",
    "Noise",
    "SmoothLawName",
    "applies",
    "bfloat16_pays",
    "compiler_available",
    "convolve",
    "draw",
    "expect",
    "fits",
    "fits_convolution",
    "fits_expectation",
    "fits_gelu",
    "fits_normalization",
    "fits_quantization",
    "flatten",
    "gelu",
    "keys",
    "memory_format",
    "mix64",
    "mode",
    "normalize",
    "normalize_plain",
    "quantize",
    "relaxed_slope",
    "round_nearest",
    "round_symmetric",
    "slope",
    "slope_and_curvature",
    "statistics_held",
    "unflatten",
    "uniform",
    "use",
    "wide",
]
