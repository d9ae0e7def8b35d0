"""Ensembles of low-bit networks with a differentiable stochastic quantizer, attacked honestly.

    >>> import torch, bitquorum
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> quantized = bitquorum.convert(network, bitquorum.Policy(weight_bits=4, activation_bits=3))
    >>> with bitquorum.draw(seed := 7):
    ...     logits = quantized(torch.rand(5, 1, 8, 8))

Names are loaded when they are used, so that the command line starts fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "APGD": "attacks",
    "Arm": "config",
    "Certify": "certify",
    "DataChoice": "config",
    "Deterministic": "quantizers",
    "Ensemble": "ensemble",
    "Evaluation": "evaluate",
    "Experiment": "config",
    "FGSM": "attacks",
    "Ladder": "evaluate",
    "Gaussian": "quantizers",
    "Logistic": "quantizers",
    "SmoothRounding": "quantizers",
    "Objective": "objective",
    "PGD": "attacks",
    "Policy": "conversion",
    "Printed": "interface",
    "Quantizer": "quantizers",
    "StochasticRounding": "quantizers",
    "Surrogate": "quantizers",
    "Trainer": "train",
    "calibrate": "conversion",
    "convert": "conversion",
    "draw": "rng",
    "evaluate_model": "evaluate",
    "load": "data",
    "restore": "conversion",
    "worst": "evaluate",
    "wrap": "foreign",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitquorum' has no attribute {name!r}")
    return getattr(import_module(f"bitquorum.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
