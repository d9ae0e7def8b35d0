"""Attack by queries alone: random search, estimated gradients, random noise. No gradient of the model is asked for."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks.base import Attack, Criterion, Kind, Loss, Pooling, Problem, check_choices, exceeds, pooled_loss
from bitquorum.geometry import Norm
from bitquorum.interface import InputError

_HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@dataclass(frozen=True, kw_only=True)
class QueryAttack(Attack):
    """Share the choices of the attacks that only query.

    Attributes:
        loss: As `pooled_loss` has them.
        pooling: How draws and members enter the loss.
    """

    kind: ClassVar[Kind] = "gradient-free"

    loss: Loss = "margin"
    pooling: Pooling = "mean-probability"

    def __post_init__(self) -> None:
        check_choices(self.loss, self.pooling)

    def _options(self) -> str:
        loss = "" if self.loss == "margin" else f" {self.loss}"
        return loss + ("" if self.pooling == "mean-probability" else f" {self.pooling}")

    def _criterion(self, problem: Problem) -> Criterion:
        return problem.criterion or partial(pooled_loss, labels=problem.labels, loss=self.loss, pooling=self.pooling)


@final
@dataclass(frozen=True, kw_only=True)
class Square(QueryAttack):
    """Search at random: paint one square of corner values a query and keep it where the loss rises.

    The search begins with vertical stripes of width one. The share of the image that a square covers begins at
    `share` and is halved at fixed queries. Under noise each comparison averages the loss over `eot` fresh draws, common
    to the candidate and the version that it challenges. Reference: Andriushchenko et al., 2020,
    https://arxiv.org/abs/1912.00049, algorithms 1 and 2 (maximum norm only). Deviations: draws; the search goes on when
    the image is misclassified; a square that does not fit the image becomes a rectangle of equal area, on images
    without height a segment.

    Attributes:
        queries: Number of candidates.
        eot: Draws of each comparison.
        fresh: Whether the challenged version is asked again, on the candidate's draws; without noise there is no need.
        share: Share of the pixels that the first squares cover.
    """

    queries: int = 1000
    eot: int = 1
    fresh: bool = True
    share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.queries, self.eot) < 1 or not 0 < self.share <= 1:
            raise InputError(
                "expected at least one query and draw and a share in (0, 1], got "
                f"queries={self.queries}, eot={self.eot}, share={self.share}"
            )

    @property
    def label(self) -> str:
        """Return Square-queries, with what differs from the default."""
        budget = f"{self.queries}" if self.eot == 1 else f"{self.queries}x{self.eot}"
        kept = "" if self.fresh else " kept values"
        share = "" if self.share == 0.8 else f" share={self.share:g}"
        return f"Square-{budget}{kept}{share}{self._options()}"

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion, size = self._criterion(problem), _grid(problem.images)
        clean = problem.images.view(size)
        columns = _signs(problem, size[1] * size[3], "stripes").view(size[0], size[1], 1, size[3])
        best = problem.project((clean + problem.epsilon * columns).view_as(problem.images))
        value = None if self.fresh else problem.loss(best, criterion, seeds=problem.seeds(self.eot, "query", 0))
        for query in range(1, self.queries + 1):
            window = self._window(problem, query, size)
            signs = _signs(problem, size[1], "signs", query).view(size[0], size[1], 1, 1)
            painted = torch.where(window, clean + problem.epsilon * signs, best.view(size))
            candidate = problem.project(painted.view_as(problem.images))
            seeds = problem.seeds(self.eot, "query", query)
            other = problem.loss(candidate, criterion, seeds=seeds)
            challenged = problem.loss(best, criterion, seeds=seeds) if value is None else value
            better = exceeds(other, challenged)
            best = torch.where(better.view(-1, *[1] * (best.dim() - 1)), candidate, best)
            value = None if value is None else torch.where(better, other, value)
        return best

    def _window(self, problem: Problem, query: int, size: tuple[int, int, int, int]) -> Tensor:
        """Return which pixels of each example the query's square covers, [batch, 1, height, width]."""
        batch, _, rows, columns = size
        halvings = sum(query > point * self.queries / 10_000 for point in _HALVINGS)
        area = self.share / 2**halvings * rows * columns
        height = min(rows, max(1, round(math.sqrt(area))))
        width = min(columns, max(1, round(area / height)))
        u = rng.uniform(rng.derive(problem.seed, "window", query), problem.examples, 2, address="square")
        top, left = (u[:, 0] * (rows - height + 1)).long(), (u[:, 1] * (columns - width + 1)).long()
        row, column = torch.arange(rows, device=u.device), torch.arange(columns, device=u.device)
        inside_rows = (row >= top[:, None]) & (row < top[:, None] + height)
        inside_columns = (column >= left[:, None]) & (column < left[:, None] + width)
        return (inside_rows[:, :, None] & inside_columns[:, None, :]).view(batch, 1, rows, columns)


@dataclass(frozen=True, kw_only=True)
class EstimatedGradient(QueryAttack):
    r"""Share the ascent along a gradient that is estimated from symmetric differences.

    $$\hat g = \frac{1}{K} \sum_k \frac{L(x + \sigma u_k) - L(x - \sigma u_k)}{2 \sigma} u_k$$

    with directions $u_k$ of unit covariance: unbiased for a loss that is linear on the way, whatever K. Both ends of a
    pair meet the same `eot` fresh draws. They are cut at [0, 1], so that at the border the estimate is smaller.

    Attributes:
        steps: Number of steps.
        directions: Number K of pairs a step.
        sigma: Length of a difference, as a share of epsilon.
        eot: Draws of each loss.
        momentum: Weight of the earlier estimates in the direction of a step.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    steps: int = 20
    directions: int = 32
    sigma: float = 0.25
    eot: int = 1
    momentum: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.steps, self.directions, self.eot) < 1 or self.sigma <= 0 or not 0 <= self.momentum < 10:
            raise InputError(
                "expected at least one step, direction and draw, a positive sigma and a momentum in [0, 10), got "
                f"{self.steps}, {self.directions}, {self.eot}, {self.sigma} and {self.momentum}"
            )

    @property
    def label(self) -> str:
        """Return the name with its budget, and what differs from the default."""
        budget = f"{self.steps}x{self.directions}" + ("" if self.eot == 1 else f"x{self.eot}")
        sigma = "" if self.sigma == 0.25 else f" sigma={self.sigma:g}"
        momentum = "" if self.momentum == 0.75 else f" momentum={self.momentum:g}"
        return f"{type(self).__name__}-{budget}{sigma}{momentum}{self._options()}"

    @abstractmethod
    def _direction(self, u: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        """Return a random direction of unit covariance from uniform numbers in (0, 1)."""

    def estimate(
        self, problem: Problem, x: Float[Tensor, "batch *image"], criterion: Criterion, step: int
    ) -> Float[Tensor, "batch *image"]:
        """Return the estimated gradient at `x`."""
        reach, total = self.sigma * problem.epsilon, torch.zeros_like(x)
        for pair in range(self.directions):
            seed = rng.derive(problem.seed, "direction", step, pair)
            u = rng.uniform(seed, problem.examples, x[0].numel(), address="direction").view_as(x).to(x.dtype)
            direction = self._direction(u)
            seeds = problem.seeds(self.eot, "step", step, "pair", pair)
            above, below = (
                problem.loss((x + sign * reach * direction).clamp(0, 1), criterion, seeds=seeds) for sign in (1, -1)
            )
            total += ((above - below) / (2 * reach)).view(-1, *[1] * (x.dim() - 1)) * direction
        return total / self.directions

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion, x = self._criterion(problem), problem.images
        velocity, length = torch.zeros_like(x), problem.epsilon * 2.5 / self.steps
        for step in range(self.steps):
            velocity = self.momentum * velocity + self.estimate(problem, x, criterion, step)
            x = problem.ascend(x, velocity, length)
        return x


@final
@dataclass(frozen=True, kw_only=True)
class SPSA(EstimatedGradient):
    """Climb along a gradient estimated from random signs (simultaneous perturbation, Spall, 1992).

    Reference: Uesato et al., 2018, https://arxiv.org/abs/1802.05666, algorithm 1. Deviations: draws; steps of fixed
    length with momentum in place of Adam.
    """

    def _direction(self, u: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


@final
@dataclass(frozen=True, kw_only=True)
class NES(EstimatedGradient):
    """Climb along a gradient estimated from normal directions (natural evolution strategy).

    Reference: Ilyas et al., 2018, https://arxiv.org/abs/1804.08598, algorithm 1. Deviation: draws.
    """

    def _direction(self, u: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        return math.sqrt(2) * (2 * u - 1).erfinv()


@final
@dataclass(frozen=True, kw_only=True)
class RandomNoise(QueryAttack):
    """Try random points of the ball, every other one a corner of it for `linf`, and keep that of the largest loss.

    Attributes:
        tries: Number of points.
        draws: Draws on which they are compared.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    tries: int = 10
    draws: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.tries, self.draws) < 1:
            raise InputError(f"expected at least one try and draw, got tries={self.tries}, draws={self.draws}")

    @property
    def label(self) -> str:
        """Return the name with its budget."""
        return f"random noise {self.tries}x{self.draws}{self._options()}"

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        return problem.best(self._points(problem), self._criterion(problem), draws=self.draws)

    def _points(self, problem: Problem) -> Iterator[Float[Tensor, "batch *image"]]:
        for index in range(self.tries):
            point = problem.random_point("try", index)
            if index % 2 and problem.norm == "linf":
                signs = _signs(problem, point[0].numel(), "corner", index).view_as(point)
                point = problem.project(problem.images + problem.epsilon * signs)
            yield point


def _signs(problem: Problem, count: int, *path: int | str) -> Float[Tensor, "batch count"]:
    u = rng.uniform(rng.derive(problem.seed, *path), problem.examples, count, address="signs")
    return torch.where(u < 0.5, -1.0, 1.0).to(problem.images.dtype)


def _grid(images: Float[Tensor, "batch *image"]) -> tuple[int, int, int, int]:
    """Return the shape [batch, channels, height, width] as which images are painted."""
    shape = images.shape
    if images.dim() == 4:
        return shape[0], shape[1], shape[2], shape[3]
    return shape[0], 1, 1, images[0].numel()
