"""Test whether MI and accuracy go together along the levels of a threat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations as orders
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum import rng
from bitquorum.interface import InputError

QUANTITIES: Final = ("pair_mi", "residual", "label_mi")
_LEAST: Final = 3  # points: two lie on a line in any case
_COUNTED: Final = 7  # points of which all 5,040 orders are counted


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """State how two lists of numbers go together.

    Attributes:
        points: How many there are.
        pearson: Linear correlation; `None` for fewer than three points or where one list is constant.
        spearman: Correlation of ranks, likewise.
        p_value: Share of orders of one list whose linear correlation is as far from zero: probability of the
            correlation if order were chance. Points of one curve depend on each other, so it is no test of a law.
        exact: Whether all orders were counted.
    """

    points: int
    pearson: float | None
    spearman: float | None
    p_value: float | None
    exact: bool


def correlate(x: Sequence[float], y: Sequence[float], *, permutations: int = 10_000, seed: int = 0) -> Correlation:
    """Correlate two lists, with a permutation test in both directions.

    Up to seven points every order is counted; beyond that `permutations` random ones are, and the given order is
    counted among them (Phipson and Smyth, 2010, https://doi.org/10.2202/1544-6115.1585).

    Raises:
        InputError: if the lists differ in length, or hold NaN or infinity.

    Examples:
        >>> correlate([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0])
        Correlation(points=4, pearson=1.0, spearman=1.0, p_value=0.0833..., exact=True)
    """
    if len(x) != len(y):
        raise InputError(f"expected two lists of equal length, got {len(x)} and {len(y)}")
    if not all(map(math.isfinite, (*x, *y))):
        raise InputError("expected finite numbers, got NaN or infinity among them; leave out these points")
    count = len(x)
    first, second = (_standard(torch.tensor(values, dtype=torch.float64)) for values in (x, y))
    if count < _LEAST or first is None or second is None:
        return Correlation(points=count, pearson=None, spearman=None, p_value=None, exact=False)
    pearson = float(first @ second)
    ranks = [_standard(_ranks(torch.tensor(values, dtype=torch.float64))) for values in (x, y)]
    spearman = float(ranks[0] @ ranks[1])  # type: ignore[operator]  # no list is constant here
    exact = count <= _COUNTED
    if exact:
        order = torch.tensor(list(orders(range(count))))
    else:
        keys = rng.uniform(rng.derive(seed, "permutations"), torch.arange(permutations), count)
        order = keys.argsort(1)
    beyond = int(((second[order] @ first).abs() >= abs(pearson) - 1e-12).sum())
    p_value = beyond / math.factorial(count) if exact else (beyond + 1) / (permutations + 1)
    return Correlation(
        points=count, pearson=round(pearson, 12), spearman=round(spearman, 12), p_value=p_value, exact=exact
    )


def correlation_rows(rows: Sequence[dict[str, Any]], *, permutations: int, seed: int) -> list[dict[str, Any]]:
    """Return the correlation of accuracy with each quantity: per arm and threat, pooled over threats, and over arms.

    Args:
        rows: Of `place`, with `arm`, `threat`, `axis` and `level`; the clean row is a point of every threat.
        permutations: See `correlate`.
        seed: See `correlate`.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    threats = list(dict.fromkeys(row["threat"] for row in rows if row["kind"] != "clean"))
    found = []
    for arm in (*arms, "all arms") if len(arms) > 1 else arms:
        mine = [row for row in rows if arm in (row["arm"], "all arms")]
        for threat in (*threats, "pooled"):
            chosen = [row for row in mine if threat == "pooled" or row["threat"] == threat or row["kind"] == "clean"]
            if all(row["kind"] == "clean" for row in chosen):
                continue
            for quantity in QUANTITIES:
                points = [(row[quantity], row["accuracy"]) for row in chosen if row[quantity] is not None]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                result = correlate(x, y, permutations=permutations, seed=seed)
                found.append({"arm": arm, "threat": threat, "quantity": quantity, **vars(result)})
    return found


def _standard(x: Float[Tensor, "points"]) -> Float[Tensor, "points"] | None:
    """Return a list of mean zero and norm one; `None` for a constant one."""
    centred = x - x.mean()
    norm = centred.norm()
    return None if not len(x) or float(norm) <= 1e-12 * max(1.0, float(x.abs().max())) else centred / norm


def _ranks(x: Float[Tensor, "points"]) -> Float[Tensor, "points"]:
    """Return the rank of each number; equal numbers share the mean of their ranks."""
    return ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).double() / 2
