"""Serve an ensemble with a detector in front: a prediction, a set or a rejection."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks.base import check_inputs
from bitquorum.detect.calibration import held_out_scores, p_values, threshold_at
from bitquorum.detect.reference import CleanReference
from bitquorum.detect.statistics import InputStatistic, PredictionMI, scores_of
from bitquorum.ensemble import Ensemble, answered, check_labels, unanswered
from bitquorum.interface import InputError
from bitquorum.registry import decode, encode


@dataclass(frozen=True, kw_only=True, eq=False)
class Guarded:
    """Hold what a guard says about images.

    Attributes:
        prediction: Class, whether accepted or not; -1 where logits give no probabilities.
        accepted: Whether the image looks like a clean one.
        sets: Classes that conform to the image; none of them where nothing does.
        statistic: Score; larger is more suspicious.
        p_value: How likely a clean image is to be as suspicious.
        probability: Of each class, averaged over members and draws.
    """

    prediction: Int[Tensor, "batch"]
    accepted: Bool[Tensor, "batch"]
    sets: Bool[Tensor, "batch classes"]
    statistic: Float[Tensor, "batch"]
    p_value: Float[Tensor, "batch"]
    probability: Float[Tensor, "batch classes"]


@final
class Guard(nn.Module):
    r"""Guard an ensemble: reject what is more suspicious than clean images are, and state sets of classes.

    An image is accepted where its score does not exceed the threshold of `threshold_at`. Its set is split conformal,

    $$\{ c : 1 - \bar p_c \le q \}$$

    with q the order statistic number $\lceil (n + 1) \gamma \rceil$ of $1 - \bar p_y$ on held-out images and the
    coverage $\gamma$. For images that are exchangeable with the held-out ones the set holds the true class with a
    probability of at least $\gamma$, accepted or not, and a clean image is rejected at about the chosen rate. Under
    attack neither holds: an attacker moves scores and sets at will, and one who knows the detector evades it (see
    `Evasive`).

    Outside of `rng.draw` every call draws afresh; inside of one it is a deterministic function. The ensemble is put
    into evaluation mode. Scores, joint tables, quantile and settings are buffers, so that `state_dict` holds all that
    makes the guard; `restore` builds one of a stored one. Reference for the sets: Sadinle, Lei, Wasserman, 2019,
    https://arxiv.org/abs/1609.00451 (least ambiguous sets); Angelopoulos and Bates, 2021,
    https://arxiv.org/abs/2107.07511, section 1.

    Args:
        ensemble: Is run in evaluation mode.
        scores: Of held-out clean images; see `held_out_scores`.
        joints: Of `CleanReference`.
        quantile: The number q.
        statistic: What is scored.
        passes: Number of draws behind a prediction and its score.
        false_positives: Share of clean images that may be rejected.

    Raises:
        InputError: for too few scores for the rate, or no pass.

    Examples:
        >>> ensemble = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2)])
        >>> images, labels = torch.rand(100, 1, 2, 2), torch.arange(100) % 3
        >>> guard = Guard.fit(ensemble, images, labels, passes=2)
        >>> answer = guard(images[:5])
        >>> answer.prediction.shape, answer.sets.shape, bool((answer.p_value > 0).all())
        (torch.Size([5]), torch.Size([5, 3]), True)
    """

    scores: Tensor
    joints: Tensor
    quantile: Tensor
    settings: Tensor

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        scores: Float[Tensor, "held_out"],
        joints: Float[Tensor, "pairs classes classes"],
        quantile: Float[Tensor, ""],
        statistic: InputStatistic | None = None,
        passes: int = 10,
        false_positives: float = 0.05,
    ) -> None:
        super().__init__()
        if passes < 1:
            raise InputError(f"expected at least one pass, got {passes}")
        threshold_at(scores, false_positives)
        self.ensemble = ensemble.eval()
        self.statistic = statistic or PredictionMI()
        self.passes, self.false_positives = passes if ensemble.stochastic else 1, false_positives
        for name, value in (("scores", scores), ("joints", joints), ("quantile", quantile)):
            self.register_buffer(name, value.detach().clone())
        table = {"statistic": encode(self.statistic), "passes": self.passes, "false_positives": false_positives}
        self.register_buffer("settings", torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8))

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        ensemble: Ensemble,
        images: Float[Tensor, "images *image"],
        labels: Int[Tensor, "images"],
        *,
        statistic: InputStatistic | None = None,
        passes: int = 10,
        false_positives: float = 0.05,
        coverage: float = 0.9,
        seed: int = 0,
        batch_size: int = 50,
    ) -> "Guard":
        """Calibrate on held-out clean images; each batch meets draws of its own.

        Args:
            ensemble: Is put into evaluation mode.
            images: In [0, 1], unseen in training and like those to be met.
            labels: True classes.
            statistic: What is scored; `PredictionMI` by default.
            passes: Number of draws behind a prediction and its score; one where no member has noise.
            false_positives: Share of clean images that may be rejected.
            coverage: Share of clean images whose set is to hold the true class.
            seed: Of the draws.
            batch_size: Images that share draws of the weights; fewer are nearer to fresh draws.

        Raises:
            InputError: for bad images or labels, or too few of them for the rate or the coverage; for a statistic that
                compares votes where there is a single view; for logits that are not numbers.
        """
        check_inputs(images, labels, 0.0)
        if passes < 1 or batch_size < 1:
            raise InputError(f"expected at least one pass and one image per batch, got {passes} and {batch_size}")
        ensemble.eval()
        passes = passes if ensemble.stochastic else 1
        parts = []
        for number, rows in enumerate(torch.arange(len(images), device=images.device).split(batch_size)):
            with rng.draw(rng.derive_many(seed, passes, "calibration", number), rows):
                parts.append(ensemble(images[rows]))
        logits, chosen = torch.cat(parts, 2), statistic or PredictionMI()
        check_labels(labels, logits.shape[-1])
        if bool(unanswered(logits).any()):
            raise InputError("expected logits that are numbers on clean images, got NaN; train the ensemble anew")
        missing = 1 - logits.softmax(-1).mean((0, 1)).gather(1, labels[:, None])[:, 0]
        return cls(
            ensemble,
            scores=held_out_scores(chosen, logits),
            joints=CleanReference.fit(logits).joints,
            quantile=torch.tensor(threshold_at(missing, 1 - coverage), device=images.device),
            statistic=chosen,
            passes=passes,
            false_positives=false_positives,
        )

    @classmethod
    def restore(
        cls,
        ensemble: Ensemble,
        state: Mapping[str, Tensor],
        *,
        statistic: InputStatistic | None = None,
        passes: int | None = None,
        false_positives: float | None = None,
    ) -> "Guard":
        """Return the guard of a stored `state_dict`, over an ensemble of equal structure, whose weights it loads.

        Args:
            ensemble: Its weights are overwritten.
            state: As `state_dict` returned it.
            statistic: Only for the state of an earlier version, which does not hold the settings.
            passes: The same.
            false_positives: In place of the stored rate.

        Raises:
            InputError: if a buffer of a guard is missing, or the statistic or passes are not those of the stored
                scores.
        """
        missing = [name for name in ("scores", "joints", "quantile") if name not in state]
        if missing:
            raise InputError(f"expected the state of a guard, got one without {', '.join(missing)}")
        try:
            known = json.loads(bytes(state["settings"].tolist())) if "settings" in state else {}
            fitted = decode(InputStatistic, known["statistic"]) if known else statistic
        except (ValueError, KeyError) as error:
            raise InputError(f"expected the settings of a guard, got: {error}; fit it anew") from error
        given = passes if passes is None or ensemble.stochastic else 1
        count = known.get("passes", given or 10)
        if statistic not in (None, fitted) or given not in (None, count):
            raise InputError(
                f"expected the statistic and passes that the stored scores are of, {fitted} and {count}, got "
                f"{statistic} and {passes}; leave them out"
            )
        guard = cls(
            ensemble,
            scores=state["scores"],
            joints=state["joints"],
            quantile=state["quantile"],
            statistic=fitted,
            passes=count,
            false_positives=known.get("false_positives", 0.05) if false_positives is None else false_positives,
        )
        guard.load_state_dict({**state, "settings": guard.settings})
        return guard

    @property
    def threshold(self) -> float:
        """Score above which an image is rejected."""
        return threshold_at(self.scores, self.false_positives)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch *image"]) -> Guarded:
        """Return predictions, sets and rejections.

        Where logits give no probabilities the prediction is -1, which is no class, and the image is rejected with the
        score infinity and an empty set.

        Raises:
            InputError: for images that are not finite floats in [0, 1], or none.
        """
        if not len(images):
            raise InputError("expected at least one image, got an empty batch")
        check_inputs(images, torch.zeros(len(images), dtype=torch.int64), 0.0)
        self.ensemble.eval()
        ambient = rng.current()
        first, *others = ambient.seeds if ambient else (rng.fresh_seed(),)
        with rng.draw(rng.derive_many(first, self.passes, "guard", *others), ambient.examples if ambient else None):
            logits = self.ensemble(images)
        probability = logits.softmax(-1).mean((0, 1))
        score = scores_of(self.statistic, logits, CleanReference(joints=self.joints))
        return Guarded(
            prediction=answered(self.ensemble.aggregation, logits),
            accepted=score <= self.threshold,  # written so that NaN is rejected
            sets=1 - probability <= self.quantile,
            statistic=score,
            p_value=p_values(self.scores, score),
            probability=probability,
        )
