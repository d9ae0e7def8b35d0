"""Test the measurement itself: models of known accuracy, intervals of known coverage, draws that never meet."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import FGSM, PGD, Transfer
from bitquorum.conversion import Policy
from bitquorum.data import ImageSet
from bitquorum.ensemble import Ensemble, MajorityVote
from bitquorum.evaluate import CLEAN, WORST, Cell, Evaluation, interval, judge, worst
from bitquorum.interface import Cost, InputError
from bitquorum.quantizers import Quantizer, StochasticRounding


def image_set(images: Tensor, labels: Tensor, classes: int = 2) -> ImageSet:
    return ImageSet(
        name="toy",
        split="test",
        images=images,
        labels=labels,
        classes=tuple(map(str, range(classes))),
        index=torch.arange(len(images)) * 7 + 5,
    )


class Coin(nn.Module):
    """Answer class 0 with the probability that is the image's only pixel: stochastic rounding to one bit."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = Quantizer(1, law=StochasticRounding())

    def forward(self, images: Tensor) -> Tensor:
        head = self.quantizer(images.flatten(1))
        return torch.cat([head, 1 - head], 1)


def coins(count: int, seed: int) -> ImageSet:
    chance = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return image_set(chance.view(-1, 1, 1, 1), torch.zeros(count, dtype=torch.int64))


class Wide(nn.Module):
    """Run a network in float64, so that the batch size cannot turn a rounding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.double())


def small_case(count: int = 8) -> tuple[Ensemble, ImageSet]:
    """Return two random quantized members and images that they mostly get right."""
    with rng.torch_seed(0):
        networks = [
            nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.BatchNorm1d(12), nn.Linear(12, 3))
            for _ in range(2)
        ]
        images = torch.rand(count, 1, 4, 4)
    built = Ensemble.build(networks, [Policy(weight_bits=3, activation_bits=2)] * 2)
    ensemble = Ensemble([Wide(member) for member in built.members]).eval()
    with rng.draw(range(20)):
        score = ensemble(images).mean((0, 1))
        labels = (score - score.mean(0)).argmax(-1)
    return ensemble, image_set(images, labels, 3)


SMALL = Evaluation(attacks=(FGSM(), PGD(steps=2, eot=2)), epsilons=(0.05, 0.2), draws=4, batch_size=3)
LARGE = replace(SMALL, batch_size=30)


def same(first: Cell, second: Cell) -> bool:
    facts = [(cell.attack, cell.epsilon, cell.cost, cell.largest) for cell in (first, second)]
    return facts[0] == facts[1] and torch.equal(first.correct, second.correct)


# Accuracy that is known


def test_sources_that_an_evaluation_does_not_have_are_refused_at_once():
    with pytest.raises(InputError, match=r"expected attacks from nearest, mean, float, .* from 'nope'; only a ladder"):
        Evaluation(attacks=(Transfer(source="nope"),))


def test_expected_accuracy_of_coins():
    data, draws = coins(400, 0), 50
    (cell,) = Evaluation(attacks=(), draws=draws)(Ensemble([Coin()]), data)
    chance = data.images.flatten()
    variance = (chance * (1 - chance)).mean() / (draws * len(data))
    accuracy = cell.accuracy()
    assert abs(accuracy.value - float(chance.mean())) < 4 * math.sqrt(variance)
    assert (accuracy.images, accuracy.draws) == (400, 50)
    by_image = cell.correct.float().mean(0)
    assert bool(((by_image - chance).abs() < 5 * (chance * (1 - chance) / draws).sqrt() + 1e-6).all())


def test_a_prediction_of_three_passes_votes():
    data, draws = coins(400, 1), 40
    ensemble = Ensemble([Coin()], passes=3, aggregation=MajorityVote())
    (cell,) = Evaluation(attacks=(), draws=draws)(ensemble, data)
    q = data.images.flatten()
    chance = 3 * q**2 - 2 * q**3
    variance = (chance * (1 - chance)).mean() / (draws * len(data))
    assert abs(cell.accuracy().value - float(chance.mean())) < 4 * math.sqrt(variance)


def test_accuracy_under_attack_is_the_probability_that_is_left():
    """FGSM moves every coin by epsilon; the accuracy that is left is the mean of max(0, p - epsilon)."""
    data, draws, epsilon = coins(300, 2), 40, 0.25
    evaluation = Evaluation(attacks=(FGSM(eot=4),), epsilons=(epsilon,), draws=draws)
    _, cell = evaluation(Ensemble([Coin()]), data)
    chance = (data.images.flatten() - epsilon).clamp(min=0)
    variance = (chance * (1 - chance)).mean() / (draws * len(data))
    assert abs(cell.accuracy().value - float(chance.mean())) < 4 * math.sqrt(variance)
    assert cell.largest == pytest.approx(epsilon)
    assert cell.cost == Cost(forward=4, backward=4)


def test_judging_draws_are_common_to_all_attacks_and_depend_on_the_seed():
    data = coins(50, 3)
    ensemble, batch = Ensemble([Coin()]), next(data.batches(50))
    first = judge(ensemble, batch.images, batch, draws=8, seed=1)
    assert torch.equal(first, judge(ensemble, batch.images, batch, draws=8, seed=1))
    assert torch.equal(first[:5], judge(ensemble, batch.images, batch, draws=5, seed=1))
    assert not torch.equal(first, judge(ensemble, batch.images, batch, draws=8, seed=2))
    assert first.shape == (8, 50)
    assert len({tuple(row.tolist()) for row in first}) == 8


class Recorder(nn.Module):
    """Note the seeds of every pass: those that an attack differentiates, and the others."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seen: dict[bool, list[int]] = {True: [], False: []}

    def forward(self, images: Tensor) -> Tensor:
        draw = rng.current()
        assert draw is not None
        self.seen[images.requires_grad].extend(draw.seeds)
        return self.network(images)


def test_judging_draws_were_never_seen_by_the_attack():
    data, recorder = coins(6, 4), Recorder(Coin())
    ensemble = Ensemble([recorder], passes=2)
    attack = PGD(steps=3, eot=2, restarts=2, selection=5)
    Evaluation(attacks=(attack,), epsilons=(0.1,), draws=4)(ensemble, data)
    attacked, others = set(recorder.seen[True]), set(recorder.seen[False])
    judges = {seed for index in range(4) for seed in rng.derive_many(rng.derive(0, "judge"), 2, "draw", index)}
    assert len(attacked) == 3 * 2 * 2
    assert not attacked & others
    assert judges < others
    assert len(others - judges) == attack.selection
    assert len(judges) == 4 * 2


# Running, resuming, batching


@pytest.mark.long
def test_cells_resumed_equal_cells_in_one_go():
    ensemble, data = small_case()
    fresh: list[Cell] = []
    ticks: list[tuple[int, int]] = []
    whole = SMALL(ensemble, data, on_cell=fresh.append, on_batch=lambda *tick: ticks.append(tick))
    assert [(cell.attack, cell.epsilon) for cell in whole] == SMALL.cells()
    assert SMALL.cells()[0] == (CLEAN, 0.0)
    assert len(fresh) == len(whole) == 5
    assert ticks == [(count, 15) for count in range(1, 16)]
    for done in ([], whole[:2], [whole[3], whole[1]], whole):
        fresh.clear()
        resumed = SMALL(ensemble, data, done=done, on_cell=fresh.append)
        assert all(same(a, b) for a, b in zip(resumed, whole, strict=True))
        assert len(fresh) == 5 - len(done)
        assert not {id(cell) for cell in fresh} & {id(cell) for cell in done}


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 100])
def test_the_batch_size_changes_nothing(size: int):
    ensemble, data = small_case()
    for first, second in zip(SMALL(ensemble, data), replace(SMALL, batch_size=size)(ensemble, data), strict=True):
        assert same(first, second)
        assert 0 < first.accuracy().value < 1


def test_more_epsilon_leaves_less():
    ensemble, data = small_case(30)
    clean, small, large, *_ = (cell.accuracy().value for cell in LARGE(ensemble, data))
    assert clean > small > large


def test_the_seed_chooses_images_attacks_and_judges():
    ensemble, data = small_case(30)
    chosen = replace(LARGE, examples=9).choose(data)
    assert torch.bincount(chosen.labels, minlength=3).tolist() == [3, 3, 3]
    assert LARGE.choose(data) is data
    assert replace(LARGE, examples=30).choose(data) is data
    other = replace(LARGE, examples=9, seed=1)
    assert not torch.equal(other.choose(data).index, chosen.index)
    cells, again = LARGE(ensemble, data), replace(LARGE, seed=1)(ensemble, data)
    assert not any(same(a, b) for a, b in zip(cells, again, strict=True))


def test_the_ensemble_is_left_as_it_was():
    ensemble, data = small_case()
    ensemble.train()
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    state = torch.random.get_rng_state()
    SMALL(ensemble, data)
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module.training for module in ensemble.modules())
    assert all(p.grad is None and not p.requires_grad for p in ensemble.parameters())


# The worst case


def cell(attack: str, correct: list[list[int]], *, epsilon: float = 0.1, largest: float = 0.1) -> Cell:
    return Cell(
        attack=attack,
        epsilon=epsilon,
        correct=torch.tensor(correct, dtype=torch.bool),
        cost=Cost(forward=2, backward=1),
        largest=largest,
    )


def test_the_worst_case_is_taken_image_by_image():
    first = cell("a", [[1, 0, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]])  # 3, 1, 2 and 3 of 3
    second = cell("b", [[0, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1]], largest=0.09)  # 1, 2, 1 and 3 of 3
    clean = cell(CLEAN, [[0] * 4] * 3, epsilon=0.1)
    stronger = cell("a", [[0] * 4] * 3, epsilon=0.2)
    result = worst([clean, first, second, stronger], 0.1)
    assert result.correct.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]]
    assert (result.attack, result.epsilon, result.largest) == (WORST, 0.1, 0.1)
    assert result.cost == Cost(forward=4, backward=2)
    assert result.accuracy().value <= min(first.accuracy().value, second.accuracy().value)
    with pytest.raises(InputError, match=r"attacks at epsilon 0\.3"):
        worst([clean, first, second, stronger], 0.3)


def test_the_worst_case_never_exceeds_any_attack():
    ensemble, data = small_case()
    cells = SMALL(ensemble, data)
    for epsilon in SMALL.epsilons:
        by_image = torch.stack([c.correct.float().mean(0) for c in cells if c.epsilon == epsilon and c.attack != CLEAN])
        assert torch.equal(worst(cells, epsilon).correct.float().mean(0), by_image.amin(0))


# The interval


def wilson(p: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the roots q of (p - q)^2 = z^2 q (1 - q) / n, which define the interval."""
    a, b, c = 1 + z * z / n, -(2 * p + z * z / n), p * p
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize("right", [0, 1, 7, 10, 20])
@pytest.mark.parametrize("draws", [1, 6])
def test_without_noise_it_is_the_wilson_interval_of_the_images(right: int, draws: int):
    correct = (torch.arange(20) < right).expand(draws, 20)
    result = interval(correct)
    assert (result.low, result.high) == pytest.approx(wilson(right / 20, 20), abs=1e-9)
    assert (result.value, result.images, result.draws) == (pytest.approx(right / 20), 20, draws)


def test_published_wilson_values():
    """81 of 263 (Newcombe, 1998, Statistics in Medicine 17, table I): 0.2553 to 0.3662; 0 of 20: 0 to 0.1611."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        result = interval((torch.arange(n) < right)[None])
        assert (result.low, result.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_it_narrows_with_images_and_with_draws():
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(40, 1600, generator=generator) < 0.5
    results = [interval(noise[:draws, :images]) for draws, images in ((1, 100), (40, 100), (1, 1600))]
    widths = [result.high - result.low for result in results]
    assert widths[0] == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.05)
    assert widths[1] == pytest.approx(widths[0] / math.sqrt(40), rel=0.25)
    assert widths[2] == pytest.approx(widths[0] / 4, rel=0.05)


def test_a_single_right_prediction_does_not_narrow_it():
    nothing = torch.zeros(20, 200, dtype=torch.bool)
    one = nothing.clone()
    one[3, 5] = True
    assert interval(one).high >= interval(nothing).high == pytest.approx(wilson(0.0, 200)[1])
    assert interval(~one).low <= interval(~nothing).low == pytest.approx(wilson(1.0, 200)[0])


def test_what_all_images_share_of_a_draw_widens_it():
    """Images that are all right in 6 draws of 10 and all wrong in 4 say what 10 trials say, and no more."""
    shared = (torch.arange(10) < 6)[:, None].expand(10, 500)
    result = interval(shared)
    low, high = wilson(0.6, 10)
    assert result.low < low
    assert result.high > high
    assert result.low > 0.15


def coverage(sample: Callable[[], Tensor], truth: float, repeats: int) -> float:
    results = [interval(sample()) for _ in range(repeats)]
    return sum(result.low <= truth <= result.high for result in results) / repeats


CASES = {
    "images without noise": (400, 1, 0.0, 0.0, 0.7),
    "noise in every cell": (100, 20, 0.3, 0.0, 0.6),
    "many draws of a few images": (40, 50, 0.3, 0.0, 0.5),
    "little noise shared by a draw": (300, 20, 0.3, 0.05, 0.5),
    "much noise shared by a draw": (300, 20, 0.2, 0.2, 0.5),
    "much noise, shared by few draws": (300, 6, 0.2, 0.2, 0.5),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_the_interval_covers_the_truth_19_times_of_20(name: str):
    """Draw images and draws anew each time; 1,000 repeats know the coverage to 0.7 %."""
    images, draws, by_image, by_draw, truth = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def sample() -> Tensor:
        image = by_image * (2 * torch.rand(images, generator=generator) - 1)
        draw = by_draw * (2 * torch.rand(draws, 1, generator=generator) - 1)
        return torch.rand(draws, images, generator=generator) < truth + image + draw

    repeats = 1000
    error = math.sqrt(0.95 * 0.05 / repeats)
    assert abs(coverage(sample, truth, repeats) - 0.95) < 3 * error


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilons": (0.2, 0.1)}, "increasing epsilons"),
        ({"epsilons": (0.1, 0.1)}, "increasing epsilons"),
        ({"epsilons": (0.0, 0.1)}, "increasing epsilons"),
        ({"epsilons": (0.5, 8.0)}, "increasing epsilons"),
        ({"draws": 0}, "at least one draw"),
        ({"batch_size": 0}, "one image per batch"),
        ({"examples": -1}, "examples of at least 0"),
        ({"attacks": (FGSM(loss="margin"), FGSM(loss="margin"))}, "different labels"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **options)


def test_a_label_beyond_the_classes_of_the_ensemble_is_refused():
    ensemble = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(4, 2))])
    data = image_set(torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1]), classes=3)
    with pytest.raises(InputError, match="expected labels below the 2 classes, got 2"):
        Evaluation(attacks=(FGSM(),), epsilons=(0.1,), examples=3)(ensemble, data)
