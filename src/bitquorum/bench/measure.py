"""Measure what a row shows beside its accuracies: a detector on the worst images, and the time of a prediction."""

import time
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum import rng
from bitquorum.bench.suite import Entry
from bitquorum.data import ImageSet
from bitquorum.detect import Detection, MaxSoftmax, Observed, PredictionMI, detect
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import observe

FALSE_POSITIVES: Final = 0.05
_PASSES: Final = 10  # draws behind one score
_BATCH, _REPEATS = 100, 5  # of the timing


def measure_detector(
    entry: Entry,
    ensemble: Ensemble,
    test: ImageSet,
    chosen: ImageSet,
    worst: Float[Tensor, "images *image"],
) -> dict[str, Any]:
    """Return what the mutual information of prediction and (member, draw) finds of the ladder's worst images.

    The threshold lets through 95 % of held-out clean images; positives are worst images that fool and were right when
    clean. The attacks do not know the detector, so this is its upper side: `bitquorum detect` attacks it. A single
    network without noise has nothing to compare; its largest probability stands in.

    Args:
        entry: Number of held-out images, and the seed.
        ensemble: In evaluation mode.
        test: All test images; those that are not chosen set the threshold.
        chosen: Images under attack.
        worst: Their worst versions.
    """
    views = ensemble.stochastic or ensemble.answers > 1
    statistic = PredictionMI() if views else MaxSoftmax()
    detection = Detection(statistics=(statistic,), passes=_PASSES, false_positives=(FALSE_POSITIVES,), aware=None)
    rest = test.select((~torch.isin(test.index, chosen.index)).nonzero()[:, 0])
    held_out = rest.take(min(entry.calibration, len(rest)), seed=rng.derive(entry.ladder.seed, "held out"))

    def observed(images: ImageSet, shown: Tensor, threat: str) -> Observed:
        purpose = "calibration" if images is held_out else "test"
        seed = rng.derive(entry.ladder.seed, "detect", purpose)
        logits = observe(ensemble, shown, images.index, draws=_PASSES, seed=seed)
        return Observed(logits=logits, labels=images.labels, threat=threat, level=entry.ladder.epsilons[0])

    before = observed(chosen, _images(chosen), "clean")
    calibration, after = observed(held_out, _images(held_out), "clean"), observed(chosen, worst.cpu(), "worst")
    rows, _ = detect(detection, ensemble.aggregation, calibration, before, [after])
    row = next(row for row in rows if row["name"] == "detection")
    kept = (
        "statistic",
        "calibration",
        "successes",
        "auroc",
        "auroc_low",
        "auroc_high",
        "tpr5",
        "tpr5_low",
        "tpr5_high",
    )
    return {key: row.get(key) for key in kept}


@torch.no_grad()
def measure_time(ensemble: Ensemble, images: Float[Tensor, "images *image"]) -> float:
    """Return the milliseconds of one prediction of one image, in batches of 100: the least of several repeats."""
    batch = images[:_BATCH]
    seeds = rng.derive_many(0, ensemble.passes, "time")
    taken = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        with rng.draw(seeds):
            ensemble.predict(ensemble(batch)).cpu()  # waits for the device
        taken.append(time.perf_counter() - started)
    return round(1000 * min(taken) / len(batch), 4)


def _images(data: ImageSet) -> Float[Tensor, "images *image"]:
    return data.batch(torch.arange(len(data))).images
