"""Measure how suspicious an input looks by what the members of an ensemble say under several draws."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.detect.reference import CleanReference, one_hot_votes, paired
from bitquorum.ensemble import unanswered
from bitquorum.information import entropy
from bitquorum.interface import InputError, Method


@dataclass(frozen=True, kw_only=True)
class Statistic(Method, ABC):
    """Turn logits into scores of which larger ones are more suspicious.

    A *view* is one member under one draw. `name` is that of the tables; `needs_pairs` says whether two views are
    compared, so that a single one says nothing.
    """

    name: ClassVar[str]
    needs_pairs: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "scores"]:
        """Return one score for each input, or for each window of inputs."""


@dataclass(frozen=True, kw_only=True)
class InputStatistic(Statistic, ABC):
    """Score each input by itself, and show attackers a differentiable stand-in."""

    @abstractmethod
    def smooth(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return a score on the same scale that is differentiable in the logits."""

    def reached(self, views: int) -> float:
        """Return which part of its mean over many views the mean score of a few has."""
        return 1.0


def scores_of(
    statistic: Statistic, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
) -> Float[Tensor, "batch"]:
    """Return the score of each input, infinite where logits give no probabilities: no statistic can compare these."""
    lost = unanswered(logits)
    return statistic(logits.masked_fill(lost[:, None], 0.0), reference).masked_fill(lost, torch.inf)


@dataclass(frozen=True, kw_only=True)
class SmoothStatistic(InputStatistic, ABC):
    """Score by what is differentiable already."""

    def smooth(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the statistic itself."""
        return self(logits, reference)


@final
@dataclass(frozen=True, kw_only=True)
class PredictionMI(SmoothStatistic):
    r"""Score by the MI between the prediction and the view that makes it (D1).

    $$H\Big(\frac{1}{TM} \sum_{t,m} p_{tm}\Big) - \frac{1}{TM} \sum_{t,m} H(p_{tm})$$

    In bits, from 0, where all views say the same, to log2 C. Of few views it is biased downwards: one view has none.
    Reference: Houlsby et al., 2011, Bayesian active learning, https://arxiv.org/abs/1112.5745, eq. 2; as a detector of
    attacks Smith and Gal, 2018, https://arxiv.org/abs/1803.08533. Deviation: views are members and draws of quantizer
    noise in place of samples of a posterior.

    Examples:
        >>> agree, split = torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([[99.0, -99.0], [-99.0, 99.0]])
        >>> reference = CleanReference(joints=torch.full((1, 2, 2), 0.25))
        >>> PredictionMI()(torch.stack([agree, split], 1)[None], reference).tolist()
        [0.0, 1.0]
    """

    name: ClassVar[str] = "prediction-mi"
    needs_pairs: ClassVar[bool] = True

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the MI of each input."""
        views = logits.softmax(-1).flatten(0, 1)
        return entropy(views.mean(0)) - entropy(views).mean(0)

    def reached(self, views: int) -> float:
        """Return (V - 1) / V: to first order the MI is a variance over V views, taken as independent."""
        return (views - 1) / views


@final
@dataclass(frozen=True, kw_only=True)
class PointwiseMI(InputStatistic):
    r"""Score by how rarely the members vote this way together on clean images (D2).

    $$-\sum_{i<j} \log_2 \frac{P_{ij}(y_i, y_j)}{P_i(y_i) \, P_j(y_j)}$$

    in bits, of the hard votes y, averaged over draws; P is the clean joint of `CleanReference`, whose smoothing bounds
    the score. On clean images its mean is minus the sum of the pairwise MI. One member has its draws as views: one
    pair, averaged over every two draws; a single view is refused. Votes alone count, so members that agree on a wrong
    class are not suspicious. The stand-in `smooth` is the expected score of votes drawn from each view's
    probabilities.

    Our own statistic; Church and Hanks, 1990, word association norms, for the pointwise MI.

    Examples:
        >>> reference = CleanReference(joints=torch.tensor([[[0.375, 0.125], [0.125, 0.375]]]))
        >>> agree, split = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> [round(float(x), 3) for x in PointwiseMI()(torch.stack([agree, split], 1)[None], reference)]
        [-0.585, 1.0]
    """

    name: ClassVar[str] = "pointwise-mi"
    needs_pairs: ClassVar[bool] = True

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the score of the hard votes on each input."""
        return _rarity(one_hot_votes(logits), reference)

    def smooth(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the expected score of votes drawn from the views' probabilities."""
        return _rarity(logits.softmax(-1), reference)


@final
@dataclass(frozen=True, kw_only=True)
class MaxSoftmax(SmoothStatistic):
    r"""Score by what is missing to certainty.

    $$1 - \max_c \bar p_c$$

    with the probability averaged over views; in [0, 1 - 1/C]. Reference: Hendrycks and Gimpel, 2017,
    https://arxiv.org/abs/1610.02136, section 2, for one network.

    Examples:
        >>> reference = CleanReference(joints=torch.full((1, 2, 2), 0.25))
        >>> MaxSoftmax()(torch.tensor([[[[0.75, 0.25]]]]).log(), reference).tolist()
        [0.25]
    """

    name: ClassVar[str] = "max-softmax"

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the probability of all classes but the likeliest."""
        # Summed, for one minus a rounded one would make ties of the surest inputs.
        return _mean_probability(logits).sort(-1, descending=True).values[..., 1:].sum(-1)


@final
@dataclass(frozen=True, kw_only=True)
class Disagreement(InputStatistic):
    r"""Score by the share of pairs of views whose votes differ.

    $$1 - \frac{\sum_c n_c (n_c - 1)}{V (V - 1)}$$

    with $n_c$ of V views for class c, a view being one member under one draw; in [0, 1], and 0 for a single view. The
    stand-in `smooth` is the expected share for votes drawn from each view's probabilities.

    Examples:
        >>> reference = CleanReference(joints=torch.full((3, 2, 2), 0.25))
        >>> round(float(Disagreement()(torch.tensor([[[[1.0, 0]], [[1.0, 0]], [[0, 1.0]]]]), reference)), 4)
        0.6667
    """

    name: ClassVar[str] = "disagreement"
    needs_pairs: ClassVar[bool] = True

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the share of each input."""
        return _differing(one_hot_votes(logits))

    def smooth(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the expected share of votes drawn from the views' probabilities."""
        return _differing(logits.softmax(-1))


@final
@dataclass(frozen=True, kw_only=True)
class Energy(SmoothStatistic):
    r"""Score by the free energy of the mean logits.

    $$-\log \sum_c e^{\bar z_c}$$

    in nats, without bounds. Reference: Liu et al., 2020, https://arxiv.org/abs/2010.03759, eq. 4, at temperature 1.
    Deviation: the logits are averaged over views.

    Examples:
        >>> reference = CleanReference(joints=torch.full((1, 2, 2), 0.25))
        >>> round(float(Energy()(torch.zeros(1, 1, 1, 2), reference)), 4)
        -0.6931
    """

    name: ClassVar[str] = "energy"

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the energy of each input."""
        return -logits.mean((0, 1)).logsumexp(-1)


@final
@dataclass(frozen=True, kw_only=True)
class Entropy(SmoothStatistic):
    r"""Score by the entropy of the mean prediction.

    $$H(\bar p)$$

    in bits, in [0, log2 C]: what `PredictionMI` counts and what every view by itself leaves open. Reference:
    Lakshminarayanan, Pritzel, Blundell, 2017, https://arxiv.org/abs/1612.01474, section 3.5.

    Examples:
        >>> reference = CleanReference(joints=torch.full((1, 2, 2), 0.25))
        >>> Entropy()(torch.zeros(1, 2, 1, 4), reference).tolist()
        [2.0]
    """

    name: ClassVar[str] = "entropy"

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "batch"]:
        """Return the entropy of each input."""
        return entropy(_mean_probability(logits))


def _mean_probability(logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
    return logits.softmax(-1).mean((0, 1))


def _rarity(views: Float[Tensor, "draw member batch classes"], reference: CleanReference) -> Float[Tensor, "batch"]:
    first, second = paired(views)
    table = reference.pointwise().to(views)
    if len(table) != len(first) or table.shape[-1] != views.shape[-1]:
        raise InputError(
            f"expected a reference of {len(first)} pairs and {views.shape[-1]} classes, got {len(table)} and "
            f"{table.shape[-1]}; fit it on this ensemble"
        )
    return -torch.einsum("plna,pab,plnb->n", first, table, second) / first.shape[1]


def _differing(views: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch"]:
    count = views.shape[0] * views.shape[1]
    alike = views.sum((0, 1)).square().sum(-1) - views.square().sum((0, 1, -1))
    return 1 - alike / (count * (count - 1)) if count > 1 else alike
