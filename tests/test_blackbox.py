"""Test the attacks that only query: known optima, estimators without bias, and what they may not ask for."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import FGSM, NES, SPSA, RandomNoise, Square
from bitquorum.attacks.base import Problem, pooled_loss
from bitquorum.ensemble import Ensemble
from bitquorum.interface import Cost, InputError
from bitquorum.testing import check_attack

ATTACKS = [
    Square(queries=4),
    Square(queries=3, eot=2, fresh=False, loss="cross-entropy"),
    SPSA(steps=2, directions=2),
    SPSA(steps=2, directions=2, eot=2, momentum=0.0, pooling="mean-logits"),
    NES(steps=2, directions=3),
    RandomNoise(tries=3, draws=2),
    RandomNoise(tries=1),
]


def linear(features: int = 12, classes: int = 2) -> Ensemble:
    with rng.torch_seed(3):
        return Ensemble([nn.Linear(features, classes)]).eval().requires_grad_(False)


def optimum(model: Ensemble, images: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    weight = model.members[0].weight
    return (images + epsilon * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)


def margin(model: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
    return pooled_loss(model(images), labels, loss="margin", pooling="mean-probability")


def problem(model: Ensemble, images: Tensor, labels: Tensor, **options) -> Problem:
    options = {"epsilon": 0.1, "examples": torch.arange(len(images)), **options}
    return Problem(model=model, images=images, labels=labels, **options)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.label)
def test_keeps_the_contract(attack):
    check_attack(attack)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.label)
def test_asks_for_no_gradient(attack):
    class Opaque(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return images.flatten(1)[None, None, :, :3]

    result = attack(Opaque(), torch.rand(4, 1, 3, 3), torch.arange(4) % 3, epsilon=0.1)
    assert result.cost.backward == 0
    assert attack.kind == "gradient-free"


@pytest.mark.parametrize(
    ("attack", "forward"),
    [
        (Square(queries=7, eot=3), 7 * 3 * 2),
        (Square(queries=7, eot=3, fresh=False), 3 + 7 * 3),
        (SPSA(steps=4, directions=5, eot=3), 4 * 5 * 3 * 2),
        (NES(steps=2, directions=3), 12),
        (RandomNoise(tries=6, draws=5), 30),
        (RandomNoise(tries=1, draws=5), 0),
    ],
)
def test_counts_its_queries(attack, forward):
    model, images, labels = linear(), torch.rand(5, 12), torch.arange(5) % 2
    assert attack(model, images, labels, epsilon=0.1).cost == Cost(forward=forward)


@pytest.mark.parametrize("fresh", [False, True])
def test_square_finds_the_corner_that_is_optimal_for_a_linear_model(fresh: bool):
    model, images, labels = linear(), 0.3 + 0.4 * torch.rand(20, 12), torch.arange(20) % 2
    found = Square(queries=400, fresh=fresh)(model, images, labels, epsilon=0.1).images
    assert torch.allclose(found, optimum(model, images, labels, 0.1), atol=1e-6)


@pytest.mark.long
def test_square_finds_the_worst_corner_of_a_small_image_which_enumeration_knows():
    with rng.torch_seed(2):
        network = nn.Sequential(nn.Flatten(), nn.Linear(9, 24), nn.Tanh(), nn.Linear(24, 3))
    for parameter in network.parameters():
        parameter.data *= 2
    model = Ensemble([network]).eval()
    images, labels, epsilon = 0.3 + 0.4 * torch.rand(12, 1, 3, 3), torch.arange(12) % 3, 0.2
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9))).view(-1, 1, 3, 3)
    with torch.no_grad():
        known = torch.stack(
            [
                margin(model, images[i] + epsilon * corners, labels[i].expand(len(corners))).max()
                for i in range(len(images))
            ]
        )
        found = Square(queries=500, fresh=False)(model, images, labels, epsilon=epsilon).images
        reached = margin(model, found, labels)
        noise = margin(model, RandomNoise(tries=10, draws=1)(model, images, labels, epsilon=epsilon).images, labels)
    assert bool((reached <= known + 1e-5).all())
    assert float((reached >= known - 1e-4).float().mean()) > 0.9
    assert float(reached.mean()) > float(noise.mean()) + 0.1


def test_square_paints_rectangles_of_corner_values_that_shrink():
    images, labels = torch.full((6, 3, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    seen: list[Tensor] = []

    class Watcher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.sum((1, 2, 3))[None, None, :, None].expand(1, 1, -1, 3) * torch.tensor([0.0, 1.0, 0.0])

    Square(queries=40, fresh=False)(Watcher(), images, labels, epsilon=0.1)
    assert all(bool(torch.isclose((x - images).abs(), torch.tensor(0.1)).all()) for x in seen)
    assert bool((seen[0] == seen[0][:, :, :1]).all()), "the search begins with vertical stripes"
    plan = Square(queries=1000)
    windows = [
        plan._window(problem(Watcher(), images, labels), query, (6, 3, 8, 8)).float().mean((1, 2, 3))
        for query in (1, 10, 100, 1000)
    ]
    assert all(bool((window == window[0]).all()) for window in windows)
    assert [float(window[0]) for window in windows] == [49 / 64, 12 / 64, 6 / 64, 1 / 64]


@pytest.mark.long
@pytest.mark.parametrize("kind", [SPSA, NES])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_estimated_gradient_is_that_of_a_linear_loss(kind, norm):
    features, pairs = 6, 1200
    slope = torch.linspace(-2, 3, features)

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x @ slope
            return torch.stack([0 * score, score], -1)[None, None]

    images = torch.full((3, features), 0.5)
    task = problem(Linear(), images, torch.zeros(3, dtype=torch.int64), epsilon=0.01, norm=norm)
    attack = kind(directions=pairs, sigma=0.5)
    found = attack.estimate(task, images, lambda logits: logits[0, 0, :, 1], 0)
    spread = math.sqrt(float(slope.square().sum()) * (2 if kind is NES else 1) / pairs)  # of each element
    assert bool(((found - slope).abs() < 5 * spread).all())
    assert not torch.allclose(found[0], found[1]), "examples have directions of their own"


@pytest.mark.long
@pytest.mark.parametrize("attack", [SPSA(steps=10, directions=64), NES(steps=10, directions=64)])
def test_estimated_gradients_come_near_the_optimum_of_a_linear_model(attack):
    model, images, labels = linear(), 0.3 + 0.4 * torch.rand(20, 12), torch.arange(20) % 2
    found = margin(model, attack(model, images, labels, epsilon=0.1).images, labels)
    best = margin(model, FGSM()(model, images, labels, epsilon=0.1).images, labels)
    clean = margin(model, images, labels)
    assert bool((found > clean + 0.85 * (best - clean)).all())


def test_pairs_meet_common_draws():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = rng.uniform_like(x, "noise")[:, :1] * 100
            return (x[:, :2] + noise * torch.tensor([0.0, 1.0]))[None, None]

    images = torch.full((4, 5), 0.5)
    task = problem(Noisy(), images, torch.zeros(4, dtype=torch.int64))
    found = SPSA(directions=200).estimate(task, images, lambda logits: logits[0, 0, :, 1] - logits[0, 0, :, 0], 0)
    assert bool((found.abs() < 3).all()), "noise of a hundred cancels within a pair"


def test_random_noise_keeps_the_best_of_its_points():
    model, images, labels = linear(), torch.rand(30, 12), torch.arange(30) % 2
    few, many = (
        margin(model, RandomNoise(tries=tries, draws=1)(model, images, labels, epsilon=0.2).images, labels)
        for tries in (2, 30)
    )
    assert bool((many >= few - 1e-6).all())
    assert float((many - few).mean()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square(queries=0), "at least one query"),
        (lambda: Square(share=1.5), r"share in \(0, 1\]"),
        (lambda: SPSA(directions=0), "at least one step, direction and draw"),
        (lambda: NES(sigma=0.0), "positive sigma"),
        (lambda: RandomNoise(tries=0), "at least one try"),
    ],
)
def test_refuses_budgets_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()
