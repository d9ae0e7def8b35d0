"""Test the attack that knows the detector: where evasion is known to be possible, and against plain attacks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquorum import load, rng
from bitquorum.attacks import PGD, Problem
from bitquorum.conversion import Policy, calibrate
from bitquorum.detect import CleanReference, Detector, Disagreement, Energy, Evasive, PointwiseMI, PredictionMI
from bitquorum.detect.aware import _Weights
from bitquorum.ensemble import Ensemble, MajorityVote
from bitquorum.geometry import norm_of
from bitquorum.interface import Cost, InputError, Model

NO_REFERENCE = CleanReference(joints=torch.zeros(0, 2, 2))
SMALL = Evasive(steps=5, rounds=2, targets=1)


class Counting:
    """Count the passes over each image that a model is asked for."""

    def __init__(self, model: Model) -> None:
        self.model, self.forward, self.seeds = model, 0, list[tuple[int, ...]]()

    def __call__(self, images: Tensor, /) -> Tensor:
        draw = rng.current()
        assert draw is not None
        self.forward += len(draw.seeds)
        self.seeds.append(draw.seeds)
        return self.model(images)


def band(images: Tensor) -> Tensor:
    """Take images brighter than a half for class 1, with an energy that passes 2 at a brightness of 0.617."""
    x = images.flatten(1) - 0.5
    return (torch.cat([0 * x, 10 * x], 1) - 30 * x).expand(draws(), 1, -1, -1)


def draws() -> int:
    ambient = rng.current()
    return len(ambient.seeds) if ambient else 1


def small_network(seed: int, *, members: int = 2, noisy: bool = True) -> Ensemble:
    """Return members with random weights in float64."""
    with rng.torch_seed(seed):
        networks = [nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(members)]
    policy = Policy(weight_bits=3, activation_bits=3) if noisy else None
    return Ensemble.build(networks, [policy] * members).double().eval().requires_grad_(False)


def problem(count: int = 9) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    return images, torch.arange(count) % 4


def detector_of(model: Model, statistic: Any, *, passes: int = 3) -> Detector:
    images = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()
    with rng.draw(rng.derive_many(0, passes, "held out")):
        return Detector.fit(statistic, model(images), false_positives=0.1)


# Where evasion is known


def test_it_finds_the_band_between_the_boundary_and_the_threshold():
    images, labels = torch.linspace(0.3, 0.45, 8).view(8, 1), torch.zeros(8, dtype=torch.int64)
    detector = Detector(statistic=Energy(), reference=NO_REFERENCE, threshold=2.0, scale=1.0, passes=1)
    plain = PGD(steps=60, loss="margin")(band, images, labels, epsilon=0.4).images
    assert bool((detector.scores(band(plain)) > 2).all())
    for attack in (Evasive(eot=1, targets=0), Evasive(eot=1, targets=1, rounds=6)):
        found = attack(band, images, labels, epsilon=0.4, detector=detector).images
        assert bool((band(found)[0, 0].argmax(-1) == 1).all())
        assert bool((detector.scores(band(found)) <= 2).all())


@pytest.mark.long
def test_it_evades_on_digits_what_sees_a_plain_attack_of_equal_steps():
    ensemble, images, labels, held_out = digits()
    epsilon, passes = 24 / 255, 4
    with rng.draw(rng.derive_many(1, passes)):
        logits = ensemble(held_out)
    detector = Detector.fit(Energy(), logits, false_positives=0.2)

    def fooled(found: Tensor) -> float:
        with rng.draw(rng.derive_many(2, 5 * passes)):
            parts = ensemble(found).split(passes)
        wrong = torch.stack([part.softmax(-1).mean((0, 1)).argmax(-1) != labels for part in parts])
        accepted = torch.stack([detector.scores(part) <= detector.threshold for part in parts])
        return float((wrong & accepted).float().mean())

    attack = Evasive(steps=10, targets=1, rounds=3)
    steps = attack.steps * attack.rounds * (1 + attack.targets)
    evading = attack(ensemble, images, labels, epsilon=epsilon, detector=detector)
    plain = PGD(steps=steps, eot=2, loss="margin", momentum=0.75)(ensemble, images, labels, epsilon=epsilon)
    assert plain.cost.backward == evading.cost.backward
    assert fooled(evading.images) > fooled(plain.images) + 0.03


def digits() -> tuple[Ensemble, Tensor, Tensor, Tensor]:
    """Return three members, trained for a moment and quantized, 80 test images and 200 held-out ones."""
    train, test = load("digits", "train"), load("digits", "test")
    data = train.batch(torch.arange(1000))
    networks = []
    with rng.torch_seed(0):
        for _ in range(3):
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            optimizer = torch.optim.Adam(network.parameters(), 1e-2)
            for _ in range(40):
                rows = torch.randint(1000, (128,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(data.images[rows]), data.labels[rows]).backward()
                optimizer.step()
            networks.append(network)
    bits = ((4, 4), (3, 3), (4, 2))
    ensemble = Ensemble.build(networks, [Policy(weight_bits=w, activation_bits=a) for w, a in bits])
    calibrate(ensemble, data.images[:256])
    attacked = test.batch(torch.arange(80))
    held_out = train.batch(torch.arange(1000, 1200)).images
    return ensemble.eval().requires_grad_(False), attacked.images, attacked.labels, held_out


def test_without_a_gradient_of_the_statistic_it_is_a_plain_attack():
    """Members that are the same never disagree: nothing is rejected, and all that matters is to be wrong."""
    images, labels = problem(40)
    member = small_network(3, members=1, noisy=False).members[0]
    model = Ensemble([member, member])
    detector = detector_of(model, Disagreement(), passes=1)
    assert (detector.threshold, detector.scale) == (0.0, 1.0)
    found = Evasive(eot=1, targets=2)(model, images, labels, epsilon=0.1, detector=detector).images
    plain = PGD(steps=60, loss="margin")(model, images, labels, epsilon=0.1).images
    wrong, plainly = (int((model(x)[0, 0].argmax(-1) != labels).sum()) for x in (found, plain))
    assert wrong >= plainly > 20


# The search


def test_weights_rise_geometrically_then_halve_the_interval():
    weights = _Weights.start(torch.zeros(3, dtype=torch.int64))
    seen = []
    for first_rises in (True, True, True, False, True, False):
        raised = torch.tensor([first_rises, not first_rises, False])
        weights.update(raised=raised, lowered=~raised & torch.tensor([True, True, False]), by=4.0)
        seen.append(weights.weight.tolist())
    assert [row[0] for row in seen] == pytest.approx([1, 4, 16, 8, 128**0.5, (8 * 128**0.5) ** 0.5])
    assert [row[1] for row in seen] == pytest.approx([0, 0, 0, 1, 0.25, 0.5])
    assert all(row[2] == 0 for row in seen)


# What it promises


@pytest.mark.parametrize("statistic", [PredictionMI(), PointwiseMI()])
@pytest.mark.long
def test_images_stay_in_the_ball_and_do_not_depend_on_the_batch(statistic: Any):
    model, (images, labels) = small_network(4), problem()
    detector, examples = detector_of(model, statistic), torch.arange(9) * 7 + 1

    def run(rows: Tensor, seed: int = 0) -> Tensor:
        return SMALL(
            model, images[rows], labels[rows], epsilon=0.1, detector=detector, examples=examples[rows], seed=seed
        ).images

    before, state = images.clone(), torch.get_rng_state()
    whole = run(torch.arange(9))
    assert torch.equal(torch.cat([run(part) for part in torch.arange(9).split(4)]), whole)
    assert not torch.equal(run(torch.arange(9), seed=1), whole)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole.dtype == images.dtype
    assert float(norm_of(whole - images, "linf").max()) <= 0.1 + 1e-6
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1


def test_the_other_norm():
    model, (images, labels) = small_network(4), problem()
    detector = detector_of(model, PredictionMI())
    found = SMALL(model, images, labels, epsilon=0.3, detector=detector, norm="l2").images
    assert 0.2 < float(norm_of(found - images, "l2").max()) <= 0.3 + 1e-6


def test_passes_are_counted_and_ends_are_judged_on_draws_of_their_own():
    model, (images, labels) = Counting(small_network(5)), problem()
    detector = detector_of(model.model, PredictionMI())
    result = SMALL(model, images, labels, epsilon=0.1, detector=detector)
    climbs, looks, passes = (1 + SMALL.targets) * SMALL.rounds, SMALL.looks, detector.passes
    forward = climbs * SMALL.steps * SMALL.eot + (climbs + 1) * looks * passes + passes
    assert result.cost == Cost(forward=forward, backward=climbs * SMALL.steps * SMALL.eot)
    assert model.forward == forward
    judging = [seeds for seeds in model.seeds if len(seeds) == passes]  # once also to rank the wrong classes
    climbing = [seed for seeds in model.seeds if len(seeds) == SMALL.eot for seed in seeds]
    assert len(judging) == (climbs + 1) * looks + 1
    assert len(set(judging)) == looks + 1
    assert len(set(climbing)) == len(climbing)
    assert not {seed for seeds in judging for seed in seeds} & set(climbing)


def test_what_is_wrong_and_accepted_stays_so():
    model, (images, _) = small_network(6, noisy=False), problem()
    labels = (model(images).softmax(-1).mean((0, 1)).argmax(-1) + 1) % 4
    detector = replace(detector_of(model, PredictionMI(), passes=1), threshold=0.05)
    before = detector.scores(model(images)) <= 0.05
    found = model(SMALL(model, images, labels, epsilon=0.1, detector=detector).images)
    assert int(before.sum()) > 0
    assert bool((detector.scores(found) <= 0.05)[before].all())
    assert bool((found.softmax(-1).mean((0, 1)).argmax(-1) != labels).all())


def test_the_vote_of_the_owner_decides_what_is_wrong():
    """Two of three members are wrong by little, one is right by much: only the vote is wrong."""

    def model(images: Tensor) -> Tensor:
        right, wrong = torch.tensor([9.0, 0.0]), torch.tensor([0.0, 1.0])
        return torch.stack([right, wrong, wrong])[:, None].expand(draws(), -1, len(images), -1)

    images, labels = torch.full((2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    asked = Problem(model=model, images=images, labels=labels, epsilon=0.1, examples=torch.arange(2))
    mean = Detector(statistic=Energy(), reference=NO_REFERENCE, threshold=9.0, scale=1.0, passes=1)
    for detector, wrong in ((mean, False), (replace(mean, aggregation=MajorityVote()), True)):
        verdict = SMALL._judge(asked, detector, images)
        assert verdict.wrong.tolist() == [wrong] * 2
        assert verdict.accepted.all()
        assert verdict.rank.tolist() == [wrong * SMALL.looks * (SMALL.looks + 2)] * 2


def test_a_radius_of_zero_costs_nothing():
    model, (images, labels) = Counting(small_network(7)), problem()
    detector = detector_of(model.model, PredictionMI())
    result = SMALL(model, images, labels, epsilon=0.0, detector=detector)
    assert torch.equal(result.images, images)
    assert (result.cost, model.forward) == (Cost(), 0)


def test_bad_input_is_refused():
    model, (images, labels) = small_network(8), problem()
    detector = detector_of(model, PredictionMI())
    for bad in ({"images": images + 1}, {"labels": labels[:-1]}, {"epsilon": -0.1}, {"norm": "l1"}):
        options = {"images": images, "labels": labels, "epsilon": 0.1, "detector": detector} | bad
        with pytest.raises((InputError, TypeError)):
            SMALL(model, **options)
    alone = small_network(9, members=1)
    with pytest.raises(InputError, match="eot of at least 2 against prediction-mi"):
        replace(SMALL, eot=1)(alone, images, labels, epsilon=0.1, detector=detector_of(alone, PredictionMI()))


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"eot": 0}, {"rounds": 0}, {"looks": 0}, {"targets": -1}, {"slack": -1.0}, {"factor": 1.0}],
)
def test_bad_settings(options: dict[str, Any]):
    with pytest.raises(InputError, match="expected"):
        Evasive(**options)


def test_labels_state_the_budget():
    assert Evasive().label == "Evasive-20x2 r4 t2"
    assert Evasive(targets=0, eot=5).label == "Evasive-20x5 r4"
