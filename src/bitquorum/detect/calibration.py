"""Set thresholds on held-out clean scores, and turn scores into conformal p-values.

Clean inputs that the detector meets must be exchangeable with the held-out ones. Where that holds, a new clean input
is rejected with a probability of at most the false-positive rate, on average over held-out sets.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum import rng
from bitquorum.detect.reference import CleanReference
from bitquorum.detect.statistics import InputStatistic, Statistic, scores_of
from bitquorum.ensemble import Aggregation, MeanProbability
from bitquorum.interface import InputError


def threshold_at(scores: Float[Tensor, "held_out"], false_positives: float) -> float:
    r"""Return the threshold above which a share of at most `false_positives` of clean inputs lies.

    It is the order statistic number $k = \lceil (n + 1)(1 - \alpha) \rceil$ of n held-out clean scores; a score
    strictly above it is rejected. The p-value of `p_values` is then at most $\alpha$, and only then.

    Reference: Vovk, Gammerman, Shafer, 2005, Algorithmic learning in a random world, chapter 2; Angelopoulos and Bates,
    2021, https://arxiv.org/abs/2107.07511, section 1.

    Args:
        scores: Of clean inputs that no part of the detector was fitted on.
        false_positives: Rate $\alpha$, in (0, 1).

    Raises:
        InputError: if the rate is out of range, a score is NaN, or there are fewer than $1 / \alpha - 1$ scores.

    Examples:
        >>> threshold_at(torch.arange(1.0, 100.0), 0.05)
        95.0
    """
    if not 0 < false_positives < 1:
        raise InputError(f"expected a rate of false positives in (0, 1), got {false_positives}")
    if bool(scores.isnan().any()):
        raise InputError("expected scores that are numbers, got NaN; check the ensemble's logits")
    count, needed = len(scores), math.ceil(1 / false_positives - 1 - 1e-9)
    if count < needed:
        raise InputError(
            f"expected at least {needed} held-out clean scores for {100 * false_positives:g} % false positives, got "
            f"{count}; hold out more images or allow more false positives"
        )
    place = math.ceil((count + 1) * (1 - false_positives) - 1e-9)
    return float(scores.sort().values[place - 1])


def p_values(scores: Float[Tensor, "held_out"], values: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    r"""Return the conformal p-value of each score: how likely a clean input is to be as suspicious.

    $$p = \frac{1 + |\{ i : s_i \ge s \}|}{n + 1}$$

    For a clean input $P(p \le \alpha) \le \alpha$. It lies in [1 / (n + 1), 1]; NaN gets the smallest. Reference: that
    of `threshold_at`; Bates et al., 2023, https://arxiv.org/abs/2104.08279.

    Raises:
        InputError: if there is no held-out score.

    Examples:
        >>> p_values(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 9.0]))
        tensor([1.0000, 0.7500, 0.2500])
    """
    if not len(scores):
        raise InputError("expected at least one held-out clean score, got none")
    below = torch.searchsorted(scores.sort().values, values.contiguous())
    return (1 + len(scores) - below).to(scores) / (len(scores) + 1)


def held_out_scores(
    statistic: InputStatistic, logits: Float[Tensor, "draw member images classes"], *, folds: int = 10
) -> Float[Tensor, "images"]:
    """Return the score of each clean image under a reference that was fitted without it.

    Images are dealt to the folds by chance, the same at each call; the reference of one is that of the other folds. A
    statistic that asks for no reference gets plain scores. A new input is scored by the reference of all images: so the
    scores are those of cross-conformal prediction, whose rate of false positives is near the nominal one, but
    guaranteed only up to twice of it (Vovk, 2015, cross-conformal predictors; Barber et al., 2021,
    https://arxiv.org/abs/1905.02928).

    Raises:
        InputError: if there are fewer than two images or folds, or a single view where views are compared.
    """
    images = logits.shape[2]
    if not has_pairs(statistic, logits):
        raise InputError(
            f"expected two members or two draws for {statistic.name}, got one member under one draw; choose another "
            "statistic, such as max-softmax"
        )
    if min(images, folds) < 2:
        raise InputError(f"expected at least two clean images and two folds, got {images} and {folds}")
    order = rng.uniform(0, torch.arange(images), 1, address="fold")[:, 0].argsort(stable=True).to(logits.device)
    fold = torch.empty_like(order)
    fold[order] = torch.arange(images, device=logits.device) % folds  # in the order given, a fold might be a class
    scores = logits.new_empty(images)
    for index in range(min(folds, images)):
        held_out = fold == index
        reference = CleanReference.fit(logits[:, :, ~held_out])
        scores[held_out] = statistic(logits[:, :, held_out], reference)
    return scores


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """Hold a calibrated detector, as its owner runs it and as an attacker who knows it sees it.

    Attributes:
        statistic: Scores inputs.
        reference: Of clean images.
        threshold: Scores strictly above it are rejected.
        scale: Distance from the median of the clean scores to the threshold, positive; the unit of a penalty.
        passes: Number of draws that a score, and the prediction beside it, averages over.
        aggregation: How the prediction is made.
    """

    statistic: InputStatistic
    reference: CleanReference
    threshold: float
    scale: float
    passes: int
    aggregation: Aggregation = field(default_factory=MeanProbability)

    @classmethod
    def fit(
        cls,
        statistic: InputStatistic,
        logits: Float[Tensor, "draw member images classes"],
        *,
        false_positives: float = 0.05,
        aggregation: Aggregation | None = None,
    ) -> "Detector":
        """Calibrate on held-out clean images; `passes` is the number of draws in their logits.

        Raises:
            InputError: as `threshold_at` and `held_out_scores` do.
        """
        scores = held_out_scores(statistic, logits)
        threshold = threshold_at(scores, false_positives)
        return cls(
            statistic=statistic,
            reference=CleanReference.fit(logits),
            threshold=threshold,
            scale=max(threshold - float(scores.median()), 0.0) or 1.0,
            passes=len(logits),
            aggregation=aggregation or MeanProbability(),
        )

    def scores(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch"]:
        """Return the score of each input, infinite where its logits give no probabilities."""
        return scores_of(self.statistic, logits, self.reference)


def has_pairs(statistic: Statistic, logits: Float[Tensor, "draw member images classes"]) -> bool:
    """Return whether the logits hold the views that a statistic compares."""
    return not statistic.needs_pairs or logits.shape[0] * logits.shape[1] > 1
