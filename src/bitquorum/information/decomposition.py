r"""Decompose what two members know about the label into redundancy, unique parts and synergy, in bits.

The measure is that of Bertschinger et al. (BROJA). It minimises I(Y; A, B) over all laws Q with the marginals
(Y, A) and (Y, B) of the given one, which is convex. Its dual,

$$\max_{\lambda, \mu} \sum_{ya} P_{ya} \lambda_{ya} + \sum_{yb} P_{yb} \mu_{yb} \quad \text{with} \quad
g_{ab} = \log \sum_y e^{\lambda_{ya} + \mu_{yb}} \le 0,$$

is climbed by Newton steps along a logarithmic barrier. The primal law is read from the barrier's slopes and rounded
to exact marginals, so that primal value less dual value bounds the error whatever the steps did.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.tables import mutual_information, xlog2x
from bitquorum.interface import BitquorumError, InputError

_BARRIERS, _STEPS, _HALVINGS = 16, 50, 40


@final
@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Hold who carries what about the label, in bits; the first four add up to I(Y; A, B).

    Each of the four is off by at most `gap`, a proven bound: unique parts are too high and the others too low.
    """

    redundancy: float
    unique_a: float
    unique_b: float
    synergy: float
    gap: float


@torch.no_grad()
def decompose(joint: Float[Tensor, "y a b"], *, tolerance: float = 1e-6) -> Decomposition:
    r"""Decompose I(Y; A, B) into redundancy, what A alone knows, what B alone knows, and synergy.

    $$U_A = \min_Q I_Q(Y; A \mid B), \quad U_B = \min_Q I_Q(Y; B \mid A), \quad
    R = I(Y; A) - U_A, \quad S = I(Y; A, B) - \min_Q I_Q(Y; A, B)$$

    over the laws Q that agree with the given one on (Y, A) and on (Y, B); one Q minimises all three. It is computed
    in float64 on the CPU and has no gradient.

    Args:
        joint: Joint probabilities of the label and two members; they sum to one.
        tolerance: The largest `gap` that is accepted, in bits; 1e-9 is within reach for small tables.

    Raises:
        InputError: if the table is no distribution or `tolerance` is not positive.
        BitquorumError: if the gap stays above the tolerance.

    Reference: Bertschinger, Rauh, Olbrich, Jost, Ay, 2014, quantifying unique information, definition 1,
    https://arxiv.org/abs/1311.2852; the dual is after Makkeh, Theis, Vicente, 2017, bivariate partial information
    decomposition: the optimization perspective. Deviation: a barrier on the dual instead of their cone
    program.

    Examples:
        >>> conjunction = torch.tensor([[[0.25, 0.25], [0.25, 0.0]], [[0.0, 0.0], [0.0, 0.25]]])
        >>> parts = decompose(conjunction)
        >>> print(f"{parts.redundancy:.3f} {parts.unique_a:.3f} {parts.unique_b:.3f} {parts.synergy:.3f}")
        0.311 0.000 0.000 0.500
    """
    if joint.dim() != 3:
        raise InputError(f"decompose: expected a table [y, a, b], got shape {tuple(joint.shape)}")
    if not tolerance > 0:
        raise InputError(f"decompose: expected a tolerance above 0, got {tolerance}")
    p = _check.distribution(joint, (-3, -2, -1), "decompose").cpu().double()
    p = p / p.sum()
    problem = _Problem(p)
    gap, best, floor = math.inf, problem.product, -math.inf
    for law, dual in problem.climb():
        floor = max(floor, dual)
        best = min(best, law, key=_conditional)
        gap = max(0.0, _conditional(best) - floor) / math.log(2)
        if gap <= tolerance:
            break
    if not gap <= tolerance:
        raise BitquorumError(f"decompose: expected a gap of at most {tolerance} bits, got {gap:.2g}; allow more")
    first, second = float(mutual_information(p.sum(2))), float(mutual_information(p.sum(1)))
    least, whole = (float(mutual_information(law.flatten(1))) for law in (best, p))
    return Decomposition(
        redundancy=first + second - least,
        unique_a=least - second,
        unique_b=least - first,
        synergy=whole - least,
        gap=gap,
    )


class _Problem:
    """Hold the fixed marginals of one table, and climb its dual; cells that no law can fill are left out."""

    def __init__(self, p: Float[Tensor, "y a b"]) -> None:
        self.first, self.second = p.sum(2), p.sum(1)
        label = p.sum((1, 2)).clamp_min(torch.finfo(p.dtype).tiny)
        self.product = self.first[:, :, None] * self.second[:, None, :] / label[:, None, None]
        self.cells = (self.first[:, :, None] > 0) & (self.second[:, None, :] > 0)
        self.pairs = self.cells.any(0)

    def climb(self) -> Iterator[tuple[Float[Tensor, "y a b"], float]]:
        """Yield a law with the fixed marginals and a lower bound on the least value in nats, for each barrier."""
        labels = len(self.first)
        first = torch.zeros_like(self.first)
        second = torch.full_like(self.second, -math.log(labels) - 1)
        sharpness = float(self.pairs.sum())
        for _ in range(_BARRIERS):
            for _ in range(_STEPS):
                moved = self._step(first, second, sharpness)
                if moved is None:
                    break
                first, second = moved
            slack, share = self._slack(first, second)
            law = self._feasible((share / slack).where(self.cells, 0.0) / sharpness)
            yield law, self._dual(first, second) + float(slack[self.pairs].min())
            sharpness *= 8

    def _dual(self, first: Float[Tensor, "y a"], second: Float[Tensor, "y b"]) -> float:
        return float((self.first * first).sum() + (self.second * second).sum())

    def _slack(
        self, first: Float[Tensor, "y a"], second: Float[Tensor, "y b"]
    ) -> tuple[Float[Tensor, "a b"], Float[Tensor, "y a b"]]:
        """Return -g of each pair, 1 for a pair that no law can fill, and the softmax over the labels."""
        sums = (first[:, :, None] + second[:, None, :]).masked_fill(~self.cells, -math.inf)
        sums = sums.where(self.pairs, 0.0)
        return (-sums.logsumexp(0)).where(self.pairs, 1.0), sums.softmax(0).where(self.cells, 0.0)

    def _barrier(self, first: Float[Tensor, "y a"], second: Float[Tensor, "y b"], sharpness: float) -> float:
        slack = self._slack(first, second)[0]
        return (
            -sharpness * self._dual(first, second) - float(slack.log().sum()) if bool((slack > 0).all()) else math.inf
        )

    def _step(
        self, first: Float[Tensor, "y a"], second: Float[Tensor, "y b"], sharpness: float
    ) -> tuple[Float[Tensor, "y a"], Float[Tensor, "y b"]] | None:
        """Return the multipliers after one damped Newton step, or `None` at the end of the barrier."""
        slack, share = self._slack(first, second)
        pull = share / slack
        gradient = torch.cat(
            [
                (pull.sum(2) - sharpness * self.first).flatten(),
                (pull.sum(1) - sharpness * self.second).flatten(),
            ]
        )
        direction = -torch.linalg.solve(self._curvature(slack, share), gradient)
        decrease = -float(gradient @ direction)
        if not decrease > 1e-9:
            return None
        towards_first, towards_second = direction.split([first.numel(), second.numel()])
        here = self._barrier(first, second, sharpness)
        for length in (0.5**halvings for halvings in range(_HALVINGS)):
            moved = first + length * towards_first.view_as(first), second + length * towards_second.view_as(second)
            if self._barrier(*moved, sharpness) <= here - 0.1 * length * decrease:
                return moved
        return None

    def _curvature(self, slack: Float[Tensor, "a b"], share: Float[Tensor, "y a b"]) -> Float[Tensor, "n n"]:
        """Return the Hessian of the barrier, made regular along shifts between multipliers that change nothing."""
        labels, width, height = share.shape
        weight = (1 / slack).where(self.pairs, 0.0)
        outer = torch.einsum("yab,zab,ab->yzab", share, share, weight.square() - weight)
        outer = outer + torch.diag_embed((share * weight).permute(1, 2, 0)).permute(2, 3, 0, 1)
        top = torch.diag_embed(outer.sum(3)).permute(0, 2, 1, 3).reshape(labels * width, labels * width)
        low = torch.diag_embed(outer.sum(2)).permute(0, 2, 1, 3).reshape(labels * height, labels * height)
        side = outer.permute(0, 2, 1, 3).reshape(labels * width, labels * height)
        whole = torch.cat([torch.cat([top, side], 1), torch.cat([side.T, low], 1)])
        used = torch.cat([(self.first > 0).flatten(), (self.second > 0).flatten()])
        owner = torch.cat([torch.arange(labels).repeat_interleave(size) for size in (width, height)])
        sign = torch.ones(len(used), dtype=share.dtype)
        sign[labels * width :] = -1
        shift = torch.nn.functional.one_hot(owner, labels).to(share) * (sign * used)[:, None]
        scale = whole.diagonal().mean()
        return whole + scale * (shift @ shift.T) + torch.diag((~used) * scale)

    def _feasible(self, law: Float[Tensor, "y a b"]) -> Float[Tensor, "y a b"]:
        """Return a law nearby with the fixed marginals (Altschuler et al., 2017, algorithm 2, for each label)."""
        tiny = torch.finfo(law.dtype).tiny
        law = law * (self.first / law.sum(2).clamp_min(tiny)).clamp(max=1)[:, :, None]
        law = law * (self.second / law.sum(1).clamp_min(tiny)).clamp(max=1)[:, None, :]
        rows = (self.first - law.sum(2)).clamp_min(0)
        columns = (self.second - law.sum(1)).clamp_min(0)
        return law + rows[:, :, None] * columns[:, None, :] / rows.sum(1).clamp_min(tiny)[:, None, None]


def _conditional(law: Float[Tensor, "y a b"]) -> float:
    return float(xlog2x(law).sum() - xlog2x(law.sum(0)).sum()) * math.log(2)
