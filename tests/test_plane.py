"""Test the coordinates of the plane where the answer is known, and the plane of a stored run."""

import inspect
import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from bitquorum.conversion import Policy
from bitquorum.data.corrupt import SEVERITIES, CorruptionName, corrupt
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import observe
from bitquorum.information import independent_error_information
from bitquorum.interface import InputError
from bitquorum.plane import Plane, correlate, correlation_rows, layer_rows, place
from bitquorum.quantizers import Deterministic, Quantizer

MEMBERS = [nn.Linear(1, 2)] * 2


def says(votes: Tensor, classes: int) -> Tensor:
    """Return logits of given votes [draws, members, images]."""
    return 9.0 * F.one_hot(votes, classes).float()


def voters(accuracy: float, labels: Tensor, *, draws: int = 1, members: int = 2, seed: int = 0) -> Tensor:
    """Return votes that err uniformly, independently of each other."""
    generator = torch.Generator().manual_seed(seed)
    shape = (draws, members, len(labels))
    wrong = (labels + torch.randint(1, 10, shape, generator=generator)) % 10
    return torch.where(torch.rand(shape, generator=generator) < accuracy, labels.expand(shape), wrong)


def test_members_that_say_the_same_share_the_entropy_of_their_votes():
    labels = torch.arange(400) % 4
    votes = torch.where(torch.arange(400) < 300, labels, (labels + 1) % 4).expand(1, 2, -1)
    point = place(Ensemble(MEMBERS), says(votes, 4), labels)
    assert point["accuracy"] == 0.75
    assert point["pair_mi"] == pytest.approx(2.0, abs=0.02)
    assert point["pair_matrix"][0][1] == pytest.approx(point["pair_matrix"][0][0], abs=0.03)
    h = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)
    assert point["label_mi"] == pytest.approx(2 - h, abs=0.03)
    assert point["conditional_mi"] == pytest.approx(h, abs=0.03)
    assert point["residual"] == pytest.approx(2 - independent_error_information(0.75, 4), abs=0.03)
    assert point["residual_low"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vote_without_an_answer_is_not_one_for_the_first_class(value: float):
    labels = torch.arange(400) % 4
    votes = says(labels.expand(2, 2, -1), 4)
    silent = votes.clone()
    silent[:, 1, labels == 0] = value
    whole, point = (place(Ensemble(MEMBERS), logits, labels) for logits in (votes, silent))
    assert point["member_accuracy"] == [1.0, 0.75]
    assert point["accuracy"] == 0.75
    for name in ("label_mi", "pair_mi", "conditional_mi"):  # it still says which images these are
        assert point[name] == pytest.approx(whole[name], abs=0.02), name
    assert point["pair_matrix"][1][1] == pytest.approx(2.0, abs=0.02)
    silent[:, 1] = value  # of which nothing can be learned
    point = place(Ensemble(MEMBERS), silent, labels)
    assert (point["member_accuracy"], point["pair_mi"]) == ([1.0, 0.0], pytest.approx(0.0, abs=0.02))


def test_members_that_err_independently_lie_on_the_reference():
    labels = torch.arange(500) % 10
    points = [place(Ensemble(MEMBERS), says(voters(0.7, labels, seed=seed), 10), labels) for seed in range(12)]
    truth = independent_error_information(0.7, 10)
    for name, wanted in (("pair_mi", truth), ("residual", 0.0), ("excess", 0.0)):
        values = np.array([point[name] for point in points])
        error = values.std(ddof=1) / math.sqrt(len(values))
        assert abs(values.mean() - wanted) < 4 * error + 0.03, name
        inside = sum(point[f"{name}_low"] <= wanted <= point[f"{name}_high"] for point in points)
        assert inside >= 9, name
    assert np.mean([point["reference_mi"] for point in points]) == pytest.approx(truth, abs=0.03)


def test_shared_confusions_raise_the_residual_and_not_the_excess():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 10
    swapped = labels ^ 1  # each class is confused with one other, by both members alike
    right = torch.rand(1, 2, 4000, generator=generator) < 0.6
    point = place(Ensemble(MEMBERS), says(torch.where(right, labels, swapped), 10), labels)
    assert point["residual_low"] > 0.5
    assert point["excess_low"] < 0.02
    assert abs(point["excess"]) < 0.02
    assert abs(point["conditional_mi"]) < 0.02


def test_more_draws_of_the_same_images_do_not_count_as_more_images():
    labels = torch.arange(200) % 10
    votes = voters(0.6, labels)
    once = place(Ensemble(MEMBERS), says(votes, 10), labels)
    often = place(Ensemble(MEMBERS), says(votes.expand(20, -1, -1), 10), labels)
    for name, value in once.items():
        if name not in ("draws", "accuracy_low", "accuracy_high"):
            np.testing.assert_allclose(often[name], value, atol=1e-9, err_msg=name)


def test_votes_cast_once_are_given_little_more_than_they_share_beyond_the_label():
    labels = torch.arange(300) % 10
    points = [place(Ensemble(MEMBERS), says(voters(0.7, labels, seed=seed), 10), labels) for seed in range(4)]
    assert abs(np.mean([point["conditional_mi"] for point in points])) < 0.2  # the jackknife gives 0.37


def test_draws_that_hardly_change_a_vote_do_not_pass_for_many():
    labels = torch.arange(300) % 10
    values = []
    for seed in range(4):
        kept = torch.rand(10, 2, 300, generator=torch.Generator().manual_seed(seed)) < 0.98
        fresh = voters(0.7, labels, draws=10, seed=100 + seed)
        votes = torch.where(kept, voters(0.7, labels, seed=seed), fresh)
        values.append(place(Ensemble(MEMBERS), says(votes, 10), labels)["conditional_mi"])
    assert abs(np.mean(values)) < 0.2  # the jackknife over all draws gives 0.34


def test_pairs_are_averaged_and_each_has_its_place_in_the_matrix():
    labels = torch.arange(400) % 4
    other = voters(0.8, labels, seed=1)[:, :1] % 4
    votes = torch.cat([labels.expand(1, 2, -1), other], 1)
    point = place(Ensemble([nn.Linear(1, 2)] * 3), says(votes, 4), labels)
    matrix = torch.tensor(point["pair_matrix"])
    upper = [float(matrix[i, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert point["pair_mi"] == pytest.approx(np.mean(upper))
    assert upper[0] > upper[1] + 0.3
    assert upper[1] == pytest.approx(upper[2])
    assert point["residual"] == pytest.approx(point["pair_mi"] - point["reference_mi"], abs=0.02)


def test_one_member_has_no_pairs_and_many_classes_no_table_of_three():
    labels = torch.arange(60) % 30
    alone = place(Ensemble(MEMBERS[:1]), says(labels.expand(1, 1, -1), 30), labels)
    assert alone["pair_mi"] is None
    assert alone["pair_matrix"] is None
    assert alone["label_mi"] > 4
    two = place(Ensemble(MEMBERS), says(labels.expand(1, 2, -1), 30), labels)
    assert two["conditional_mi"] is None
    assert two["excess_low"] is None
    assert two["pair_mi"] > 4
    noisy, images = noisy_ensemble()
    noisy.passes = 3
    with pytest.raises(InputError, match="at least 3 draws"):
        place(noisy, observe(noisy, images, torch.arange(8), draws=2, seed=0), torch.zeros(8).long())


@pytest.mark.long
@pytest.mark.parametrize("count", [3, 6, 12])
def test_correlations_are_those_of_scipy(count: int):
    generator = np.random.default_rng(count)
    x = generator.normal(size=count)
    y = (x + generator.normal(size=count)).round(1)
    found = correlate(x.tolist(), y.tolist(), permutations=5000)
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.exact == (count <= 7)
    exact = stats.permutation_test(
        (x,),
        lambda order: abs(stats.pearsonr(order, y).statistic),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=6000,
        rng=0,
    )
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.03 if count > 7 else 1e-9)


def test_what_cannot_be_correlated_is_left_open():
    assert correlate([1.0, 2.0], [1.0, 2.0]).pearson is None
    assert correlate([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).p_value is None
    assert correlate([1e6 + 0.1] * 7, list(map(float, range(7)))).pearson is None  # constant up to rounding
    with pytest.raises(InputError, match="equal length"):
        correlate([1.0], [])
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="expected finite numbers"):
            correlate([1.0, bad, 2.0], [1.0, 2.0, 3.0])


def test_correlations_are_taken_per_threat_pooled_and_over_arms():
    def row(arm: str, threat: str, level: float, value: float | None) -> dict[str, object]:
        kind = "clean" if threat == "clean" else "white-box"
        numbers = {"pair_mi": value, "residual": value, "label_mi": 1 - level, "accuracy": 1 - level}
        return {"arm": arm, "threat": threat, "kind": kind, "level": level, **numbers}

    rows = [row("one", "clean", 0.0, None)] + [row("one", "pgd", level, None) for level in (0.1, 0.2)]
    rows += [row("two", "clean", 0.0, 2.0)] + [row("two", "pgd", level, 2 - 3 * level) for level in (0.1, 0.2)]
    found = {(r["arm"], r["threat"], r["quantity"]): r for r in correlation_rows(rows, permutations=100, seed=0)}
    assert ("one", "pgd", "pair_mi") not in found
    assert found["two", "pgd", "pair_mi"]["points"] == 3
    assert found["two", "pgd", "pair_mi"]["pearson"] == 1.0
    assert found["all arms", "pooled", "label_mi"]["points"] == 6


def noisy_ensemble() -> tuple[Ensemble, Tensor]:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    policies = [Policy(weight_bits=4, activation_bits=3, image_bits=5), Policy(weight_bits=2, activation_bits=2)]
    policies.append(
        Policy(weight_bits=2, activation_bits=2, weight_law=Deterministic(), activation_law=Deterministic())
    )
    return Ensemble.build([network] * 3, policies).eval(), torch.rand(8, 1, 6, 6)


def test_layers_state_noise_and_rate_of_every_quantizer(monkeypatch: pytest.MonkeyPatch):
    ensemble, images = noisy_ensemble()
    rows = layer_rows(ensemble, images, torch.arange(8))
    assert len(rows) == sum(isinstance(module, Quantizer) for module in ensemble.modules())
    assert {row["role"] for row in rows if row["member"] == 0} == {"weight", "activation", "image"}
    for row in rows:
        silent = row["member"] == 2
        assert (row["noise_bits"] == pytest.approx(0, abs=1e-6)) == silent
        assert 0 < row["rate_bits"] <= row["bits"]
        assert row["law"] == ("deterministic" if silent else "logistic")
    image = next(row for row in rows if row["role"] == "image")
    quantizer = ensemble.members[0].quantizer
    assert image["rate_bits"] == pytest.approx(float(quantizer.rate(images)), rel=1e-5)
    assert image["noise_bits"] == pytest.approx(float(quantizer.entropy(images).mean()), rel=1e-5)
    monkeypatch.setattr("bitquorum.plane.layers._PART", 7)
    for row, again in zip(rows, layer_rows(ensemble, images, torch.arange(8)), strict=True):
        assert again == {**row, **{name: pytest.approx(row[name], abs=1e-6) for name in ("noise_bits", "rate_bits")}}


def test_observations_repeat_and_blocks_of_images_meet_draws_of_their_own():
    ensemble, few = noisy_ensemble()
    images, index = few[:1].expand(60, -1, -1, -1), torch.zeros(60, dtype=torch.int64)
    seen = observe(ensemble, images, index, draws=3, seed=1)
    assert seen.shape == (3, 3, 60, 3)
    torch.testing.assert_close(seen[:, :, :50], observe(ensemble, images[:50], index[:50], draws=3, seed=1))
    torch.testing.assert_close(seen[:, :, 0], seen[:, :, 49])
    assert not torch.allclose(seen[:, 0, 49], seen[:, 0, 50]), "the next block meets other draws"
    torch.testing.assert_close(seen[:, 2, 49], seen[:, 2, 50])  # a member without noise
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen, observe(ensemble, images, index, draws=3, seed=2))


@pytest.mark.parametrize("name", get_args(CorruptionName))
def test_corruptions_grow_with_severity_and_stay_in_range(name):
    images = torch.rand(6, 3, 16, 16)
    index = torch.arange(6)
    moved = []
    for severity in SEVERITIES:
        changed = corrupt(images, name, severity, examples=index, seed=3)
        assert float(changed.min()) >= 0
        assert float(changed.max()) <= 1
        assert torch.equal(changed, corrupt(images, name, severity, examples=index, seed=3))
        assert torch.equal(changed[2:], corrupt(images[2:], name, severity, examples=index[2:], seed=3))
        moved.append(float((changed - images).square().mean()))
    assert moved == sorted(moved)
    assert moved[0] > 0
    with pytest.raises(InputError, match="severity of 1 to 5"):
        corrupt(images, name, 6, examples=index)


def test_bytes_are_no_images_to_corrupt():
    with pytest.raises((InputError, TypeError), match=r"expected float images in \[0, 1\], got torch.uint8|dtype"):
        inspect.unwrap(corrupt)(torch.zeros(1, 1, 2, 2).byte(), "brightness", 1, examples=torch.tensor([0]))


def test_a_blur_keeps_flat_images_and_noise_has_its_deviation():
    flat = torch.full((1, 1, 9, 9), 0.5)
    assert torch.allclose(corrupt(flat, "blur", 5, examples=torch.tensor([0])), flat, atol=1e-6)
    many = torch.full((50, 1, 16, 16), 0.5)
    noise = corrupt(many, "gaussian-noise", 2, examples=torch.arange(50)) - 0.5
    assert float(noise.std()) == pytest.approx(0.04, rel=0.03)


def test_planes_are_checked():
    with pytest.raises(InputError, match="increasing severities"):
        Plane(severities=(3, 1))
    with pytest.raises(InputError, match="at least one draw"):
        Plane(draws=0)
