"""Hold what several baselines are made of: members, losses, networks."""

from dataclasses import replace
from typing import Any, Final

from bitquorum.baselines.base import Setting
from bitquorum.conversion import Policy
from bitquorum.interface import InputError
from bitquorum.objective import (
    ConditionalMI,
    EnsembleCrossEntropy,
    FeatureMI,
    InputGradient,
    MemberCrossEntropy,
    Objective,
    Term,
)
from bitquorum.quantizers import Deterministic

FARKYA: Final = "Farkya, Raghavan, Ziskind, 2023, https://arxiv.org/abs/2312.00105"
"""The paper that this library follows; bits, noise law and MI terms are our reconstruction."""

FLOAT: Final = Policy(weight_bits=None, activation_bits=None)
"""A full-precision member."""

PRECISIONS: Final = ((4, 4), (3, 3), (4, 2))
"""Bits of weights and activations of the ensembles that are ours: w4a4, w3a3 and w4a2."""


def apart(members: int) -> MemberCrossEntropy:
    """Return the loss under which each member gets its own cross-entropy in full, as if it were trained alone.

    The term averages over members, which would divide every member's gradient by their number.
    """
    return MemberCrossEntropy(weight=float(members))


def mi_objective(beta: float, gamma: float, radius: float = 0.0) -> Objective:
    r"""Return the objective of our reconstruction, on request with an input-gradient penalty.

    $$\overline{CE(p_m, y)} + CE(\bar p, y) + \beta \, \overline{I(z_i; z_j)} + \gamma \, \overline{I(p_i; p_j \mid Y)}
    + 2 r \, \overline{\|\nabla_x CE(p_m, y)\|_1}$$

    The MI terms grow over the first third of the training, the penalty over the first half. Two likelihood terms count
    twice, hence a penalty of twice the radius r.
    """
    terms: list[Term] = [
        MemberCrossEntropy(),
        EnsembleCrossEntropy(),
        FeatureMI(weight=beta, warmup=0.33),
        ConditionalMI(weight=gamma, warmup=0.33),
    ]
    if radius:
        terms.append(InputGradient(weight=2 * radius))
    return Objective(terms=tuple(terms))


def sq(weight_bits: int, activation_bits: int) -> Policy:
    """Return stochastic quantization by the default logistic law, on learned ranges."""
    return Policy(weight_bits=weight_bits, activation_bits=activation_bits)


def lsq(weight_bits: int, activation_bits: int) -> Policy:
    """Return rounding to nearest on learned ranges: LSQ, as `LowBit` describes it."""
    return Policy(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_law=Deterministic(),
        activation_law=Deterministic(),
    )


def cycle(precisions: tuple[tuple[int, int], ...], members: int) -> list[tuple[int, int]]:
    """Return as many bits of weights and activations as there are members, from the first on again after the last.

    Raises:
        InputError: if there are no precisions.

    Examples:
        >>> cycle(((4, 4), (3, 3)), 3)
        [(4, 4), (3, 3), (4, 4)]
    """
    if not precisions:
        raise InputError("expected at least one pair of weight and activation bits, got none")
    return [precisions[index % len(precisions)] for index in range(members)]


def activated(setting: Setting, activation: str) -> Setting:
    """Return the setting with another activation in its network; a network without a choice stays as it is."""
    network: Any = setting.network
    if not hasattr(network, "activation"):
        return setting
    return replace(setting, network=replace(network, activation=activation))
