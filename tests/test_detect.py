"""Test detectors where the answer is known: statistics by hand, thresholds and intervals by their guarantees."""

import math
import pickle
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from sklearn import metrics
from torch import Tensor

from bitquorum import registry
from bitquorum.detect import (
    CleanReference,
    Detection,
    Detector,
    Disagreement,
    Energy,
    Entropy,
    Evasive,
    InputStatistic,
    MaxSoftmax,
    Observed,
    PointwiseMI,
    PredictionMI,
    Statistic,
    WindowMI,
    auroc,
    detect,
    held_out_scores,
    p_values,
    roc_curve,
    share,
    threshold_at,
)
from bitquorum.detect.rows import Row
from bitquorum.detect.window import resampled
from bitquorum.ensemble import MajorityVote, MeanProbability
from bitquorum.evaluate import interval
from bitquorum.information import PlugIn
from bitquorum.interface import InputError
from bitquorum.report import rejection_table

INPUTS: tuple[InputStatistic, ...] = (
    PredictionMI(),
    PointwiseMI(),
    MaxSoftmax(),
    Disagreement(),
    Energy(),
    Entropy(),
)
NO_REFERENCE = CleanReference(joints=torch.zeros(0, 4, 4))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def voting(votes: Tensor, classes: int, sure: float = 50.0) -> Tensor:
    """Return logits of views that are sure of the given votes [draw, member, batch]."""
    return sure * torch.nn.functional.one_hot(votes, classes).float()


def noisy_votes(seed: int, draws: int, members: int, images: int, classes: int, right: float) -> tuple[Tensor, Tensor]:
    """Return votes that are right with a probability, else uniform, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    other = torch.randint(classes, (draws, members, images), generator=generator)
    hit = torch.rand(draws, members, images, generator=generator) < right
    return torch.where(hit, labels, other), labels


# Statistics


def test_views_that_say_the_same_share_no_information_with_their_prediction():
    logits = normal(0, 1, 1, 20, 4).expand(3, 2, -1, -1)
    assert float(PredictionMI()(logits, NO_REFERENCE).abs().max()) < 1e-6
    assert float(Disagreement()(logits, NO_REFERENCE).abs().max()) == 0


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_sure_views_that_split_evenly_share_log_c_bits(classes: int):
    logits = voting(torch.arange(classes).view(classes, 1, 1), classes)
    assert float(PredictionMI()(logits, NO_REFERENCE)) == pytest.approx(math.log2(classes), abs=1e-5)
    assert float(Entropy()(logits, NO_REFERENCE)) == pytest.approx(math.log2(classes), abs=1e-5)
    assert float(Disagreement()(logits, NO_REFERENCE)) == 1


def test_the_reference_and_the_pointwise_information_by_hand():
    votes, _ = noisy_votes(1, 2, 3, 30, 4, 0.7)
    reference = CleanReference.fit(voting(votes, 4), smoothing=2.0)
    tables = []
    for i, j in combinations(range(3), 2):
        table = torch.full((4, 4), 2.0 / 16)
        for t, n in product(range(2), range(30)):
            table[votes[t, i, n], votes[t, j, n]] += 1 / 2
        tables.append(table / 32)
    torch.testing.assert_close(reference.joints, torch.stack(tables))
    new, _ = noisy_votes(2, 2, 3, 5, 4, 0.3)
    scores = PointwiseMI()(voting(new, 4, 0.1), reference)
    for n in range(5):
        expected = 0.0
        for t, (table, (i, j)) in product(range(2), zip(tables, combinations(range(3), 2), strict=True)):
            a, b = new[t, i, n], new[t, j, n]
            expected -= math.log2(float(table[a, b] / (table[a].sum() * table[:, b].sum()))) / 2
        assert float(scores[n]) == pytest.approx(expected, abs=1e-4)


def test_the_mean_pointwise_information_is_the_information_of_the_votes():
    votes, _ = noisy_votes(3, 1, 2, 200, 3, 0.6)
    logits = voting(votes, 3)
    mean = PointwiseMI()(logits, CleanReference.fit(logits, smoothing=1e-6)).mean()
    assert float(mean) == pytest.approx(-PlugIn(correction="none")(votes[0, 0], votes[0, 1]).value, abs=1e-4)


def test_one_member_has_its_draws_as_views():
    votes, _ = noisy_votes(4, 4, 1, 50, 3, 0.7)
    reference = CleanReference.fit(voting(votes, 3))
    assert reference.joints.shape == (1, 3, 3)
    torch.testing.assert_close(reference.joints, reference.joints.mT)
    assert PointwiseMI()(voting(votes[:2], 3), reference).shape == (50,)
    assert WindowMI(window=25)(voting(votes, 3), reference).shape == (2,)
    single = voting(votes[:1], 3)
    assert CleanReference.fit(single).joints.shape == (0, 3, 3)
    for statistic in (PointwiseMI(), WindowMI()):
        with pytest.raises(InputError, match="one member under one draw"):
            statistic(single, CleanReference.fit(single))
    for statistic in (PredictionMI(), Disagreement()):
        assert float(statistic(single, CleanReference.fit(single)).abs().max()) == 0


def test_a_reference_of_another_ensemble_is_refused():
    votes, _ = noisy_votes(5, 2, 3, 20, 3, 0.7)
    with pytest.raises(InputError, match="expected a reference of 1 pairs and 3 classes, got 3 and 3"):
        PointwiseMI()(voting(votes[:, :2], 3), CleanReference.fit(voting(votes, 3)))
    with pytest.raises(InputError, match="positive smoothing"):
        CleanReference.fit(voting(votes, 3), smoothing=0.0)


def test_the_usual_statistics_by_hand():
    logits = 3 * normal(6, 2, 3, 10, 4)
    mean = logits.softmax(-1).mean((0, 1))
    torch.testing.assert_close(MaxSoftmax()(logits, NO_REFERENCE), 1 - mean.amax(-1))
    torch.testing.assert_close(Entropy()(logits, NO_REFERENCE), -(mean * mean.log2()).sum(-1))
    torch.testing.assert_close(Energy()(logits, NO_REFERENCE), -logits.mean((0, 1)).exp().sum(-1).log())
    votes = logits.argmax(-1).flatten(0, 1)
    differing = torch.stack([votes[i] != votes[j] for i, j in combinations(range(6), 2)]).float().mean(0)
    torch.testing.assert_close(Disagreement()(logits, NO_REFERENCE), differing)


def test_the_surest_inputs_are_not_tied():
    logits = torch.tensor([20.0, 30.0, 40.0])[:, None] * torch.tensor([1.0, 0.0])
    scores = MaxSoftmax()(logits[None, None], NO_REFERENCE)
    assert bool((scores[:-1] > scores[1:]).all())


@pytest.mark.parametrize("statistic", INPUTS)
def test_a_stand_in_has_gradients_and_equals_the_statistic_of_sure_views(statistic: InputStatistic):
    logits = normal(7, 3, 2, 12, 4)
    reference = CleanReference.fit(logits)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(statistic.smooth(leaf, reference).sum(), leaf)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0
    sure = voting(logits.argmax(-1), 4)
    torch.testing.assert_close(statistic.smooth(sure, reference), statistic(sure, reference), rtol=0, atol=1e-4)


@pytest.mark.parametrize("statistic", INPUTS)
def test_neither_the_order_of_draws_nor_the_batch_matters(statistic: InputStatistic):
    logits = normal(8, 4, 2, 9, 3)
    reference = CleanReference.fit(logits)
    scores = statistic(logits, reference)
    torch.testing.assert_close(statistic(logits.flip(0), reference), scores)
    torch.testing.assert_close(statistic(logits[:, :, 3:5], reference), scores[3:5])


def test_a_window_of_clean_votes_is_near_the_centre_and_others_are_not():
    """Members that err apart share less than members of one mind, and clean ones are in between."""
    votes, labels = noisy_votes(9, 1, 2, 2000, 4, 0.7)
    statistic, reference = WindowMI(window=100), CleanReference.fit(voting(votes, 4))
    clean = statistic(voting(noisy_votes(10, 1, 2, 2000, 4, 0.7)[0], 4), reference)
    apart = statistic(voting(noisy_votes(11, 1, 2, 2000, 4, 0.0)[0], 4), reference)
    agree = statistic(voting(labels.expand(1, 2, -1), 4), reference)
    assert float(clean.max()) < min(float(apart.min()), float(agree.min()))


@pytest.mark.parametrize("right", [0.5, 0.9])
def test_the_centre_of_a_window_shares_the_bias_of_clean_windows(right: float):
    votes, _ = noisy_votes(12, 1, 2, 20000, 10, right)
    statistic = WindowMI(window=50)
    reference = CleanReference.fit(voting(votes, 10))
    estimates = torch.tensor([PlugIn()(*votes[0, :, rows]).value for rows in torch.arange(20000).split(50)])
    error = 4 * float(estimates.std()) * math.sqrt(1 / 400 + 1 / 256)
    assert abs(statistic.centre(reference) - float(estimates.mean())) < error
    assert statistic.centre(reference) == statistic.centre(reference) != replace(statistic, seed=1).centre(reference)


def test_windows_hold_different_inputs():
    rows = resampled(30, 10, 5, seed=0).view(5, 10)
    assert all(len(set(window.tolist())) == 10 for window in rows)
    assert torch.equal(resampled(30, 10, 3, seed=0), rows[:3].flatten())
    with pytest.raises(InputError, match="at least a window of 31"):
        resampled(30, 31, 5, seed=0)


@pytest.mark.parametrize("method", [*INPUTS, WindowMI(window=20), Detection(), Evasive(steps=3), Detection(aware=None)])
def test_methods_come_back_from_tables_and_pickle(method: Any):
    assert pickle.loads(pickle.dumps(method)) == method
    assert registry.decode(type(method), registry.encode(method)) == method
    if isinstance(method, Statistic):
        assert registry.type_name(type(method)) == method.name


# Thresholds and p-values


def test_p_values_of_exchangeable_scores_are_uniform():
    repeats, held_out = 4000, 19
    scores = normal(13, repeats, held_out + 1)
    p = torch.cat([p_values(row[1:], row[:1]) for row in scores])
    for rank in (1, 5, 10, 19):
        level = rank / (held_out + 1)
        assert abs(float((p <= level + 1e-6).float().mean()) - level) < 4 * math.sqrt(level * (1 - level) / repeats)


def test_a_threshold_keeps_the_rate_of_false_positives_and_agrees_with_p_values():
    rejected = []
    for row in normal(14, 300, 120):
        threshold = threshold_at(row[:60], 0.05)
        flags = row[60:] > threshold
        assert torch.equal(flags, p_values(row[:60], row[60:]) <= 0.05 + 1e-6)
        rejected.append(float(flags.float().mean()))
    mean, error = sum(rejected) / 300, float(torch.tensor(rejected).std()) / math.sqrt(300)
    assert 3 / 61 - 4 * error < mean < 3 / 61 + 4 * error  # the 58th of 60: three of 61 places are above it


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 19), (0.01, 99), (0.5, 1), (0.3, 3)])
def test_a_threshold_says_how_many_scores_it_needs(rate: float, needed: int):
    assert threshold_at(torch.arange(float(needed)), rate) == needed - 1
    if needed > 1:
        with pytest.raises(InputError, match=f"expected at least {needed} held-out clean scores"):
            threshold_at(torch.arange(float(needed - 1)), rate)


def test_scores_that_are_all_equal_reject_nothing():
    scores = torch.zeros(100)
    assert threshold_at(scores, 0.05) == 0
    assert bool((p_values(scores, scores) == 1).all())


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_rates_out_of_range_are_refused(rate: float):
    with pytest.raises(InputError, match=r"rate of false positives in \(0, 1\)"):
        threshold_at(torch.zeros(1000), rate)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="got NaN"):
        threshold_at(torch.tensor([0.0, math.nan] * 50), 0.05)
    with pytest.raises(InputError, match="NaN"):
        auroc(torch.tensor([0.0, math.nan]), torch.tensor([1.0]))
    assert float(p_values(torch.zeros(99), torch.tensor([math.nan]))) == pytest.approx(0.01)


def test_scores_by_folds_keep_the_rate_that_scores_of_the_fitted_images_break():
    """A pair of votes that is seen once is rare on new images, but not to the table that it is part of."""
    honest, naive = [], []
    for seed in range(40):
        logits = voting(noisy_votes(100 + seed, 1, 3, 500, 10, 0.8)[0], 10)
        held_out, new = logits[:, :, :100], logits[:, :, 100:]
        reference = CleanReference.fit(held_out)
        scores = PointwiseMI()(new, reference)
        honest.append(float((scores > threshold_at(held_out_scores(PointwiseMI(), held_out), 0.1)).float().mean()))
        naive.append(float((scores > threshold_at(PointwiseMI()(held_out, reference), 0.1)).float().mean()))
    error = float(torch.tensor(honest).std()) / math.sqrt(len(honest))
    assert sum(honest) / 40 < 0.1 + 3 * error
    assert sum(naive) / 40 > 0.1 + 3 * error


def test_folds_do_not_follow_the_order_of_the_images():
    """Ten classes in turn and ten folds: were the folds dealt in turn too, each reference would miss a class."""
    votes, labels = noisy_votes(7, 1, 2, 1000, 10, 0.9)
    ordered = labels.argsort(stable=True)
    least = int(labels.bincount().min())
    turns = torch.stack([ordered[labels[ordered] == label][:least] for label in range(10)], 1).flatten()
    shuffled = turns[torch.randperm(len(turns), generator=torch.Generator().manual_seed(0))]
    found = [threshold_at(held_out_scores(PointwiseMI(), voting(votes[..., at], 10)), 0.05) for at in (turns, shuffled)]
    assert found[0] == pytest.approx(found[1], rel=0.2)


def test_a_detector_holds_threshold_and_scale():
    logits = normal(15, 3, 2, 200, 4)
    detector = Detector.fit(Entropy(), logits, false_positives=0.1, aggregation=MajorityVote())
    scores = Entropy()(logits, detector.reference)
    assert detector.threshold == threshold_at(scores, 0.1)
    assert detector.scale == pytest.approx(detector.threshold - float(scores.median()))
    assert (detector.passes, detector.aggregation) == (3, MajorityVote())
    torch.testing.assert_close(detector.scores(logits), scores)
    assert Detector.fit(Disagreement(), logits[:1].expand(2, -1, -1, -1)[:, :1]).scale == 1.0  # all scores are zero


# ROC


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_and_the_curve_are_those_of_scikit_learn(ties: bool):
    negatives, positives = normal(16, 40), normal(17, 25) + 0.7
    if ties:
        negatives, positives = negatives.round(), positives.round()
    labels, scores = torch.cat([torch.zeros(40), torch.ones(25)]), torch.cat([negatives, positives])
    area = auroc(negatives, positives)
    assert area.value == pytest.approx(metrics.roc_auc_score(labels, scores))
    assert 0 < area.low < area.value < area.high < 1
    fpr, tpr, _ = metrics.roc_curve(labels, scores, drop_intermediate=False)
    curve = roc_curve(negatives, positives)
    assert curve.fpr == pytest.approx(tuple(fpr))
    assert curve.tpr == pytest.approx(tuple(tpr))


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_area():
    negatives, positives = normal(18, 3000), normal(19, 2000) + 1
    curve = roc_curve(negatives, positives)
    assert len(curve.fpr) <= 101
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert metrics.auc(curve.fpr, curve.tpr) == pytest.approx(auroc(negatives, positives).value, abs=0.002)


def test_delong_by_hand():
    """Scores 1, 3, 4 against 0, 1, 2, each of them twenty times: shares beaten 1/2, 1, 1 and 0, 1/6, 1/3."""
    area = auroc(torch.tensor([0.0, 1.0, 2.0]).repeat(20), torch.tensor([1.0, 3.0, 4.0]).repeat(20))
    variance = (1 / 18 + 1 / 54) / 59
    half = 1.959964 * math.sqrt(variance) / (5 / 6 * 1 / 6)
    assert area.value == pytest.approx(5 / 6)
    assert math.log(area.low / (1 - area.low)) == pytest.approx(math.log(5) - half)
    assert math.log(area.high / (1 - area.high)) == pytest.approx(math.log(5) + half)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_delongs_interval_covers(shift: float):
    repeats, count = 500, 40
    true = 0.5 * (1 + math.erf(shift / 2))
    negatives, positives = normal(20, repeats, count), normal(21, repeats, count) + shift
    covered = [
        area.low <= true <= area.high for area in (auroc(a, b) for a, b in zip(negatives, positives, strict=True))
    ]
    assert sum(covered) / repeats > 0.95 - 4 * math.sqrt(0.95 * 0.05 / repeats)


def test_perfect_separation_of_few_scores_is_no_certainty():
    area = auroc(torch.zeros(500), torch.ones(20))
    assert (area.value, area.high) == (1, 1)
    assert area.low == pytest.approx(20 / (20 + 1.959964**2))
    assert auroc(torch.ones(500), torch.zeros(20)).high == pytest.approx(1 - area.low)
    assert auroc(torch.zeros(500), torch.ones(20), repeats=5.0).low < area.low
    nearly = auroc(torch.arange(200.0), torch.arange(190.0, 390.0), repeats=40.0)
    assert nearly.value < 1
    assert nearly.low > 0.5, "a logit so steep tells nothing: five trials do"
    constant = auroc(torch.zeros(50), torch.zeros(50))
    assert (constant.value, constant.low, constant.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_a_share_has_wilsons_interval(hits: int):
    flags = torch.arange(20) < hits
    found, other = share(flags), interval(flags[None])
    assert (found.value, found.low, found.high) == pytest.approx((other.value, other.low, other.high), abs=1e-9)
    wide = share(flags, repeats=4.0)
    assert wide.high - wide.low > found.high - found.low


# Rows


DETECTION = Detection(statistics=(Entropy(),), false_positives=(0.05,))


def observed(seed: int, images: int, **options: Any) -> Observed:
    """Return clean images of two classes with graded confidence, all right."""
    labels = torch.arange(images) % 2
    logits = torch.zeros(2, 2, images, 2)
    logits.scatter_(-1, labels.expand(2, 2, -1)[..., None], 6.0)
    return Observed(logits=logits + 0.5 * normal(seed, 2, 2, images, 2), labels=labels, **options)


def attack_on(clean: Observed, confident: Tensor, unsure: Tensor, **options: Any) -> Observed:
    """Make some images confidently wrong, and others wrong by little."""
    logits = clean.logits.clone()
    logits[:, :, confident] = logits[:, :, confident].flip(-1)
    logits[:, :, unsure] = 0.02 * logits[:, :, unsure].flip(-1)
    facts = {"threat": "PGD", "kind": "white-box", "level": 0.1} | options
    return Observed(logits=logits, labels=clean.labels, **facts)


def rows_of(metrics: list[Row], name: str, **facts: Any) -> list[Row]:
    return [row for row in metrics if row["name"] == name and all(row[key] == facts[key] for key in facts)]


def test_rows_of_an_attack_of_which_half_is_seen():
    calibration, clean = observed(22, 200), observed(23, 60)
    attacked = attack_on(clean, torch.arange(0, 20), torch.arange(20, 40))
    found, curves = detect(DETECTION, MeanProbability(), calibration, clean, [attacked])
    (row,) = rows_of(found, "detection")
    assert (row["successes"], row["images"], row["calibration"], row["draws"]) == (40, 60, 200, 2)
    assert row["tpr5"] == pytest.approx(0.5, abs=0.08)
    assert 0.6 < row["auroc_low"] < row["auroc"] < row["auroc_high"] < 0.9
    assert row["aware"] is False
    (cost,) = rows_of(found, "clean")
    assert cost["rejected"] < 0.2
    assert cost["accepted_right"] == pytest.approx(1 - cost["rejected"])
    (rejection,) = rows_of(found, "rejection", threat="PGD")
    assert rejection["fooled"] == pytest.approx(1 / 3, abs=0.05)
    assert rejection["fooled"] + rejection["right_or_rejected"] == pytest.approx(1)
    assert rejection["accepted_right"] == pytest.approx(1 / 3, abs=0.06)
    assert rejection["fooled_low"] < rejection["fooled"] < rejection["fooled_high"]
    (curve,) = curves
    assert (sum(curve["clean_counts"]), sum(curve["attacked_counts"])) == (60, 40)
    assert len(curve["edges"]) == len(curve["clean_counts"]) + 1
    assert curve["edges"] == sorted(curve["edges"])
    assert len(curve["fpr"]) == len(curve["tpr"]) <= 101


def test_the_worst_is_taken_image_by_image_and_level_by_level():
    calibration, clean = observed(24, 200), observed(25, 60)
    first = attack_on(clean, torch.arange(0, 20), torch.arange(0), threat="A")
    second = attack_on(clean, torch.arange(10, 30), torch.arange(0), threat="B")
    far = attack_on(clean, torch.arange(0, 50), torch.arange(0), threat="A", level=0.2)
    blurred = attack_on(clean, torch.arange(60), torch.arange(0), threat="blur", kind="corruption")
    found, _ = detect(DETECTION, MeanProbability(), calibration, clean, [first, second, far, blurred])
    worst = rows_of(found, "rejection", threat="worst")
    assert [row["level"] for row in worst] == [0.1, 0.2]
    assert worst[0]["fooled"] == pytest.approx(0.5, abs=0.06)
    assert worst[1]["fooled"] == pytest.approx(5 / 6, abs=0.06)
    assert rows_of(found, "rejection", threat="blur")[0]["fooled"] > 0.9


def test_an_attack_that_knew_one_statistic_counts_for_it_alone_on_the_images_that_it_met():
    detection = replace(DETECTION, statistics=(Entropy(), MaxSoftmax()))
    calibration, clean = observed(26, 200), observed(27, 60)
    plain = attack_on(clean, torch.arange(0), torch.arange(0, 20))
    rows = torch.arange(0, 60, 2)
    aware = attack_on(clean, torch.arange(0, 60), torch.arange(0), threat="Evasive")
    aware = replace(aware, logits=aware.logits[:, :, rows], labels=aware.labels[rows], rows=rows, against="entropy")
    found, curves = detect(detection, MeanProbability(), calibration, clean, [plain, aware])
    (row,) = rows_of(found, "detection", aware=True)
    assert (row["statistic"], row["threat"], row["successes"], row["images"]) == ("entropy", "Evasive", 30, 30)
    (worst,) = rows_of(found, "rejection", threat="worst with aware")
    assert (worst["statistic"], worst["images"], worst["aware"]) == ("entropy", 30, True)
    assert worst["fooled"] > 0.9
    assert all(row["fooled"] < 0.1 for row in rows_of(found, "rejection", threat="worst"))
    assert [curve["aware"] for curve in curves] == [False, True, False]


def test_few_successes_leave_the_quantities_empty():
    calibration, clean = observed(28, 200), observed(29, 60)
    attacked = attack_on(clean, torch.arange(0, 9), torch.arange(0))
    found, curves = detect(DETECTION, MeanProbability(), calibration, clean, [attacked])
    (row,) = rows_of(found, "detection")
    assert (row["successes"], row["auroc"], row["auroc_low"], row["tpr5"]) == (9, None, None, None)
    assert not curves


def test_windows_have_rows_of_detection_alone():
    detection = replace(DETECTION, statistics=(WindowMI(window=20),), windows=60)
    calibration, clean = observed(30, 200), observed(31, 100)
    split = attack_on(clean, torch.arange(0), torch.arange(0))
    split.logits[:, 1] = split.logits[:, 1].flip(-1)[:, torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    split.logits[:, 1] *= 2  # the second member decides
    found, curves = detect(detection, MeanProbability(), calibration, clean, [split])
    assert [row["name"] for row in found] == ["detection", *(["clean"] * len(DETECTION.false_positives))]
    assert found[1]["rejected_low"] <= found[1]["rejected"] <= found[1]["rejected_high"]
    assert found[1]["accepted_right"] is None
    assert found[0]["auroc"] > 0.95
    assert found[0]["auroc_low"] <= 5 / (5 + 1.959964**2)  # five windows of 20 stand apart
    assert sum(curves[0]["clean_counts"]) == 60
    few = observed(32, 15)
    found, curves = detect(
        detection, MeanProbability(), calibration, few, [attack_on(few, torch.arange(15), few.labels[:0])]
    )
    assert (found[0]["auroc"], curves) == (None, [])


def test_a_single_view_leaves_out_what_compares_votes():
    detection = Detection(false_positives=(0.05,))
    calibration, clean = (replace(seen, logits=seen.logits[:1, :1]) for seen in (observed(33, 120), observed(34, 60)))
    found, _ = detect(detection, MeanProbability(), calibration, clean, [])
    assert [row["statistic"] for row in found] == ["max-softmax", "energy", "entropy"]


def test_the_default_measures_every_statistic():
    calibration, clean = observed(35, 150), observed(36, 60)
    attacked = attack_on(clean, torch.arange(0, 15), torch.arange(15, 30))
    found, _ = detect(Detection(), MajorityVote(), calibration, clean, [attacked])
    assert len({row["statistic"] for row in found}) == 7
    for row in rows_of(found, "detection"):
        assert {"auroc", "tpr5", "tpr5_low", "tpr1", "tpr1_high", "level", "kind"} <= set(row)


def test_what_does_not_fit_is_refused():
    calibration, clean = observed(37, 150), observed(38, 20)
    for bad, message in (
        ((observed(39, 99), clean, []), "at least 100 held-out clean images, got 99"),
        ((calibration, replace(clean, logits=clean.logits[:1]), []), "equally many draws"),
        ((calibration, clean, [observed(40, 10)]), "with `rows` where some are missing"),
        ((calibration, clean, [replace(observed(41, 20), labels=1 - clean.labels)]), "do not fit 20"),
        ((calibration, clean, [replace(observed(42, 10), rows=torch.arange(11, 21))]), "do not fit 20"),
    ):
        with pytest.raises(InputError, match=message):
            detect(DETECTION, MeanProbability(), *bad)
    with pytest.raises(InputError, match="at least 999 held-out"):
        detect(replace(DETECTION, false_positives=(0.001,)), MeanProbability(), calibration, clean, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistics": ()}, "different names"),
        ({"statistics": (Entropy(), Entropy())}, "different names"),
        ({"calibration": 99}, "100 images"),
        ({"passes": 0}, "at least one pass"),
        ({"false_positives": (0.05, 0.05)}, "different rates"),
        ({"false_positives": (1.0,)}, "different rates"),
    ],
)
def test_bad_detections(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Detection(**options)


def test_bad_windows():
    with pytest.raises(InputError, match="at least two inputs"):
        WindowMI(window=1)
    with pytest.raises(InputError, match="one window of 50"):
        WindowMI()(torch.zeros(1, 2, 49, 3), CleanReference.fit(torch.zeros(1, 2, 49, 3)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", [MeanProbability(), MajorityVote()])
def test_an_input_without_an_answer_is_wrong_and_rejected(rule: Any, value: float):
    """Class 0 is what the argmax of NaN would be."""
    first = torch.tensor([3.0, 0.0, 0.0])
    clean = Observed(logits=normal(1, 4, 2, 60, 3) + first, labels=torch.zeros(60).long())
    calibration = Observed(logits=normal(2, 4, 2, 200, 3) + first, labels=torch.zeros(200).long())
    logits = clean.logits.clone()
    logits[1, 0, :20] = value
    attacked = Observed(logits=logits, labels=clean.labels, threat="overflow", kind="attack", level=0.1)
    detection = Detection(statistics=(*INPUTS, WindowMI(window=20)), false_positives=(0.05,), calibration=200)
    rows, curves = detect(detection, rule, calibration, clean, [attacked])
    right = float((rule(clean.logits).argmax(-1) == 0)[20:].float().sum() / 60)
    for row in rows:
        if row["name"] == "rejection" and row["threat"] == "overflow":
            assert row["accepted_right"] <= right + 1e-6
            assert row["fooled"] <= 40 / 60 - right + 1e-6
        if row["name"] == "detection" and row["statistic"] != "window-mi":
            assert row["auroc"] == pytest.approx(1.0)
    assert len(curves) == len(INPUTS) + 1


def test_windows_alone_have_no_accuracy_with_rejection():
    assert rejection_table([{"name": "detection", "arm": "a"}], "a").rows == ()


def test_curves_of_less_than_two_points_and_radii_beyond_the_image_are_refused():
    with pytest.raises(InputError, match="at least two points of a curve, got 1"):
        roc_curve(torch.arange(3.0), torch.arange(3.0), points=1)
    with pytest.raises(InputError, match=r"aware_epsilons in \(0, 1\], in units of the image, got \(5.0,\)"):
        Detection(aware_epsilons=(5.0,))


@pytest.mark.parametrize("members", [1, 2])
def test_the_score_of_few_draws_grows_to_that_of_many_as_stated(members: int):
    logits, statistic = 0.3 * normal(3, 40, members, 500, 4).double(), PredictionMI()
    few, many = (
        torch.stack([statistic(part, NO_REFERENCE).mean() for part in logits.split(count)]).mean() for count in (2, 10)
    )
    stated = statistic.reached(2 * members) / statistic.reached(10 * members)
    assert float(few / many) == pytest.approx(stated, rel=0.03)
    assert MaxSoftmax().reached(2) == 1.0
