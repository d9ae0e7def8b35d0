"""Stochastic and deterministic low-bit quantizers: one dithered family."""

from bitquorum.quantizers.laws import (
    Deterministic,
    Gaussian,
    Law,
    Logistic,
    SmoothLaw,
    SmoothRounding,
    StochasticRounding,
)
from bitquorum.quantizers.quantizer import Grid, Quantizer
from bitquorum.quantizers.surrogate import Backward, Surrogate

__all__ = [
    "Backward",
    "Deterministic",
    "Gaussian",
    "Grid",
    "Law",
    "Logistic",
    "Quantizer",
    "SmoothLaw",
    "SmoothRounding",
    "StochasticRounding",
    "Surrogate",
]
