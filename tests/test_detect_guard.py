"""Test the guard that serves an ensemble: what it promises on clean images, what it refuses, what it stores."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.conversion import Policy
from bitquorum.detect import Disagreement, Energy, Guard, Guarded, InputStatistic, MaxSoftmax, PointwiseMI, PredictionMI
from bitquorum.ensemble import Ensemble, MajorityVote
from bitquorum.files import load_tensors, save_tensors
from bitquorum.interface import InputError

CLASSES = 4


def images_of(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return noisy images whose brightest quarter is their class, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.6 * torch.rand(count, 1, 4, 4, generator=generator)
    images += 0.25 * nn.functional.one_hot(labels, CLASSES).float().view(count, 1, 4, 1)
    return images, labels


def ensemble_of(members: int = 2, *, noisy: bool = True, seed: int = 0) -> Ensemble:
    """Return members that sum the quarters of an image, of low precision where they are noisy."""
    with rng.torch_seed(seed):
        networks = [nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Dropout(0.5)) for _ in range(members)]
    for network in networks:
        network[1].weight.data.mul_(0.3).add_(2 * torch.eye(4).repeat_interleave(4, 1))
    policy = Policy(weight_bits=3) if noisy else None
    return Ensemble.build(networks, [policy] * members)


def same(first: Guarded, second: Guarded) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.long
@pytest.mark.parametrize("statistic", [PredictionMI(), PointwiseMI(), MaxSoftmax(), Energy()])
def test_sets_cover_and_rejections_are_rare_on_clean_images(statistic: InputStatistic):
    covered, rejected, repeats, count = [], [], 10, 150
    for seed in range(repeats):
        guard = Guard.fit(
            ensemble_of(), *images_of(2 * seed, 200), statistic=statistic, passes=3, coverage=0.8, false_positives=0.1
        )
        images, labels = images_of(2 * seed + 1, count)
        answer = guard(images)
        covered.append(float(answer.sets[torch.arange(count), labels].float().mean()))
        rejected.append(1 - float(answer.accepted.float().mean()))
    for shares, rate in ((covered, 0.8), (rejected, 0.1)):
        error = float(torch.tensor(shares).std()) / math.sqrt(repeats)
        assert abs(sum(shares) / repeats - rate) < 4 * error + 0.02


def test_an_answer_is_consistent():
    guard = Guard.fit(ensemble_of(), *images_of(0, 120), passes=4)
    answer = guard(images_of(1, 50)[0])
    torch.testing.assert_close(answer.probability.sum(-1), torch.ones(50))
    assert torch.equal(answer.prediction, answer.probability.argmax(-1))
    assert torch.equal(answer.accepted, answer.statistic <= guard.threshold)
    assert torch.equal(answer.accepted, answer.p_value > 0.05)
    assert torch.equal(answer.sets, 1 - answer.probability <= guard.quantile)
    assert not answer.statistic.requires_grad


def test_the_prediction_is_the_ensembles():
    ensemble = ensemble_of(3)
    ensemble.aggregation = MajorityVote()
    guard, images = Guard.fit(ensemble, *images_of(0, 120), passes=5), images_of(1, 20)[0]
    with rng.draw(7):
        answer = guard(images)
    with rng.draw(rng.derive_many(7, 5, "guard")):
        logits = ensemble(images)
    assert torch.equal(answer.prediction, MajorityVote()(logits).argmax(-1))


def test_it_is_fixed_in_a_draw_and_fresh_outside():
    guard, images = Guard.fit(ensemble_of(), *images_of(0, 120), passes=2), images_of(1, 20)[0]
    examples = torch.arange(20) + 5
    with rng.draw(3, examples):
        first, again = guard(images), guard(images)
    with rng.draw(3, examples.flip(0)):
        turned = guard(images.flip(0))
    assert same(first, again)
    torch.testing.assert_close(turned.statistic.flip(0), first.statistic)
    with rng.draw([3, 4], examples):
        both = guard(images)
    with rng.draw(4, examples):
        other = guard(images)
    for answer in (both, other, guard(images)):
        assert not torch.equal(answer.probability, first.probability)
    assert not torch.equal(guard(images).probability, guard(images).probability)


def test_the_ensemble_is_in_evaluation_mode_whatever_the_guard_is_told():
    ensemble = ensemble_of(noisy=False).train()
    guard, images = Guard.fit(ensemble, *images_of(0, 120), passes=1), images_of(1, 20)[0]
    assert same(guard(images), guard.train()(images))  # dropout would show
    assert not ensemble.training


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_beyond_the_classes_are_refused(label: int):
    images, labels = images_of(0, 120)
    with pytest.raises(InputError, match="expected labels from 0 to 3, the model's classes, got"):
        Guard.fit(ensemble_of(), images, torch.cat([labels[:-1], torch.tensor([label])]), passes=2)


def test_equal_seeds_fit_equal_guards():
    images, labels = images_of(0, 120)
    first, again, other = (Guard.fit(ensemble_of(), images, labels, passes=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)


def test_a_stored_guard_comes_back(tmp_path: Path):
    guard = Guard.fit(ensemble_of(), *images_of(0, 130), statistic=PointwiseMI(), passes=3, coverage=0.7)
    save_tensors(tmp_path / "guard.safetensors", guard.state_dict())
    state, _ = load_tensors(tmp_path / "guard.safetensors")
    earlier = {name: value for name, value in state.items() if name != "settings"}
    for back in (
        Guard.restore(ensemble_of(seed=9), state),
        Guard.restore(ensemble_of(seed=9), state, statistic=PointwiseMI(), passes=3),
        Guard.restore(ensemble_of(seed=9), earlier, statistic=PointwiseMI(), passes=3),
    ):
        with rng.draw(1):
            first, second = guard(images_of(1, 20)[0]), back(images_of(1, 20)[0])
        assert same(first, second)
        assert torch.equal(back.settings, guard.settings)
    assert Guard.restore(ensemble_of(), state, false_positives=0.1).threshold < guard.threshold
    with pytest.raises(InputError, match="expected the settings of a guard"):
        Guard.restore(ensemble_of(), {**state, "settings": state["settings"][1:]})
    for other in ({"statistic": PredictionMI()}, {"passes": 4}):
        with pytest.raises(InputError, match="expected the statistic and passes that the stored scores are of"):
            Guard.restore(ensemble_of(), state, **other)
    with pytest.raises(InputError, match="without joints"):
        Guard.restore(ensemble_of(), {name: value for name, value in state.items() if name != "joints"})


@pytest.mark.parametrize("statistic", [PredictionMI(), Disagreement(), PointwiseMI()])
def test_one_member_is_guarded_by_its_draws_if_it_has_any(statistic: InputStatistic):
    answer = Guard.fit(ensemble_of(1), *images_of(0, 120), statistic=statistic, passes=4)(images_of(1, 30)[0])
    assert answer.statistic.shape == (30,)
    with pytest.raises(InputError, match=f"two members or two draws for {statistic.name}"):
        Guard.fit(ensemble_of(1, noisy=False), *images_of(0, 120), statistic=statistic, passes=4)


def test_without_noise_one_pass_is_enough():
    guard = Guard.fit(ensemble_of(2, noisy=False), *images_of(0, 120), passes=9)
    assert guard.passes == 1
    images = images_of(1, 200)[0]
    assert same(guard(images), guard(images))
    assert float(guard(images).accepted.float().mean()) > 0.85


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4), "float batch"),
        (torch.full((1, 1, 4, 4), math.nan), "finite images"),
        (torch.full((1, 1, 4, 4), 255.0), "divide bytes by 255"),
        (torch.zeros(0, 1, 4, 4), "at least one image"),
    ],
)
def test_bad_images_are_refused(images: Tensor, message: str):
    guard = Guard.fit(ensemble_of(), *images_of(0, 120), passes=1)
    with pytest.raises(InputError, match=message):
        guard(images)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (18, {}, "at least 19 held-out clean scores"),
        (98, {"false_positives": 0.01}, "at least 99 held-out"),
        (50, {"coverage": 0.99}, "at least 99 held-out"),
        (120, {"passes": 0}, "at least one pass"),
        (120, {"batch_size": 0}, "one image per batch"),
    ],
)
def test_too_few_images_and_bad_settings_are_refused(count: int, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Guard.fit(ensemble_of(), *images_of(0, count), **{"passes": 1, **options})


class Failing(nn.Module):
    """Answer with what is no number where an image is dark."""

    def forward(self, images: Tensor) -> Tensor:
        scores = images.flatten(1)[:, :CLASSES]
        return torch.where(scores.sum(1, keepdim=True) > 0, scores, math.nan)


@pytest.mark.parametrize("statistic", [PredictionMI(), Disagreement(), MaxSoftmax()])
def test_an_image_without_an_answer_is_rejected(statistic: InputStatistic):
    images, labels = images_of(0, 100)
    ensemble = Ensemble([Failing(), Failing()])
    guard = Guard.fit(ensemble, images, labels, statistic=statistic, passes=1)
    few = images[:4].clone()
    few[1] = 0
    answer = guard(few)
    assert answer.prediction.tolist()[1] == -1
    assert not bool(answer.accepted[1])
    assert float(answer.statistic[1]) == math.inf
    assert float(answer.p_value[1]) == pytest.approx(1 / 101)
    assert not bool(answer.sets[1].any())
    rest = torch.tensor([0, 2, 3])
    assert torch.equal(answer.prediction[rest], few.flatten(1)[rest, :CLASSES].argmax(1))
    images[7] = 0
    with pytest.raises(InputError, match="expected logits that are numbers on clean images, got NaN"):
        Guard.fit(ensemble, images, labels, statistic=statistic, passes=1)


def test_labels_that_do_not_fit_are_refused():
    images, labels = images_of(0, 120)
    with pytest.raises((InputError, TypeError)):
        Guard.fit(ensemble_of(), images, labels[:-1], passes=1)
