"""Test FAB where the nearest adversarial point is known, and its projection against a general solver."""

import pytest
import torch
from torch import nn

from bitquorum import rng
from bitquorum.attacks import FAB, PGD
from bitquorum.attacks.base import Problem, targeted_loss
from bitquorum.attacks.fab import to_hyperplane
from bitquorum.ensemble import Ensemble
from bitquorum.geometry import norm_of
from bitquorum.interface import InputError
from bitquorum.testing import check_attack


def linear(features: int = 10, classes: int = 2) -> Ensemble:
    with rng.torch_seed(5):
        return Ensemble([nn.Linear(features, classes)]).eval().requires_grad_(False)


@pytest.mark.parametrize("attack", [FAB(steps=3), FAB(steps=2, eot=2, targets=2)], ids=lambda attack: attack.label)
def test_keeps_the_contract(attack):
    check_attack(attack)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_step_to_a_hyperplane_is_the_shortest_within_the_box(norm):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(200, 6, generator=generator)
    g = torch.randn(200, 6, generator=generator)
    value = -g.abs().sum(1) * torch.linspace(0.01, 0.6, 200)
    step = to_hyperplane(x, g, value, norm)
    there = x + step
    reached = value + (g * step).sum(1)
    room = torch.where(g > 0, 1 - x, x)
    can = (g.abs() * room).sum(1) >= -value
    assert bool((there >= -1e-6).all())
    assert bool((there <= 1 + 1e-6).all())
    assert 20 < int(can.sum()) < 190
    assert bool((reached[can].abs() < 1e-4).all())
    assert torch.allclose(step[~can].abs(), room[~can], atol=1e-6)
    length = norm_of(step, norm)
    for _ in range(200):  # no other feasible step on the plane is shorter
        other = ((there + 0.1 * torch.randn(200, 6, generator=generator)).clamp(0, 1) - x).double()
        slack = value + (g * other).sum(1)
        valid = can & (slack >= 0)
        assert bool((norm_of(other, norm)[valid] >= length[valid] - 1e-4).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_finds_the_distance_to_the_boundary_of_a_linear_model(norm):
    model = linear()
    images, labels = 0.4 + 0.2 * torch.rand(30, 10), torch.arange(30) % 2
    weight, bias = model.members[0].weight, model.members[0].bias
    margin = ((weight[1 - labels] - weight[labels]) * images).sum(1) + bias[1 - labels] - bias[labels]
    dual = (weight[1] - weight[0]).abs().sum() if norm == "linf" else (weight[1] - weight[0]).norm()
    distance = -margin / dual
    right = (margin < 0) & (distance < 0.2)
    images, labels, distance = images[right], labels[right], distance[right]
    problem = Problem(
        model=model, images=images, labels=labels, epsilon=0.3, examples=torch.arange(len(images)), norm=norm
    )

    def boundary(logits):
        return targeted_loss(logits, labels, 1 - labels, loss="margin", pooling="mean-logits")

    found = FAB(steps=20).nearest(problem, boundary)
    assert len(images) > 3
    assert bool((model.predict(model(found))[0] != labels).all())
    length = norm_of(found - images, norm)
    assert bool((length >= distance - 1e-5).all())
    assert bool((length <= 1.06 * distance + 1e-4).all())


class Noisy(nn.Module):
    """Add noise to the margin of a linear model of two classes."""

    stochastic = True

    def __init__(self) -> None:
        super().__init__()
        with rng.torch_seed(5):
            self.linear = nn.Linear(10, 2)

    def forward(self, x):
        logits = self.linear(x)
        return logits + 0.5 * (rng.uniform_like(logits.repeat_interleave(1, 0), "noise") - 0.5)


def test_under_noise_the_budget_is_not_spent_on_luck():
    model = Ensemble([Noisy()]).eval().requires_grad_(False)
    images = torch.rand(200, 10, generator=torch.Generator().manual_seed(3))
    labels = model.members[0].linear(images).argmax(-1)
    left = []
    for attack in (FAB(steps=10, eot=2), FAB(steps=40, eot=2), PGD(steps=10, eot=2, loss="margin")):
        found = attack(model, images, labels, epsilon=0.1).images
        with rng.draw(range(1000, 1100), torch.arange(200)):
            left.append(float((model.predict(model(found)) == labels).float().mean()))
    assert left[0] < left[2] + 0.03
    assert left[1] < left[0]


def test_breaks_a_linear_model_exactly_where_it_can_be_broken():
    model = linear(classes=4)
    images, labels = torch.rand(80, 10), torch.arange(80) % 4
    weight, bias = model.members[0].weight, model.members[0].bias
    difference = weight[None] - weight[labels][:, None]
    direction = difference.sign()
    best = ((images[:, None] + 0.1 * direction).clamp(0, 1) * difference).sum(-1) + bias[None] - bias[labels][:, None]
    can = best.scatter(1, labels[:, None], -torch.inf).amax(1)
    found = FAB(steps=20)(model, images, labels, epsilon=0.1).images
    broken = model.predict(model(found))[0] != labels
    clear = can.abs() > 0.02  # the overshoot of five in a hundred needs some room
    assert 10 < int((can > 0).sum()) < 80
    assert torch.equal(broken[clear], (can > 0)[clear])


def test_refuses_other_losses_and_budgets():
    with pytest.raises(InputError, match="the margin as loss"):
        FAB(loss="cross-entropy")
    with pytest.raises(InputError, match="at least one step"):
        FAB(steps=0)
    assert FAB(steps=8, eot=4, targets=2).label == "FAB-T-8x4 t2"


def test_counts_an_error_into_another_class_than_the_one_it_heads_for():
    class Detour(nn.Module):
        """Class 1 is farther than class 2 on the way to it; nothing of class 2 is seen in the gradient."""

        def forward(self, x):
            z = torch.stack([0.5 - x[:, 0], x[:, 0] - 1.5, (x[:, 0].detach() > 0.55) * 9.0 - 8.0], -1)
            return z[None, None]

    images, labels = torch.full((4, 3), 0.5), torch.zeros(4, dtype=torch.int64)
    found = FAB(steps=30, targets=1)(Detour(), images, labels, epsilon=0.1).images
    assert bool((Detour()(found)[0, 0].argmax(-1) == 2).all())
    assert bool(((found - images).abs() <= 0.1 + 1e-6).all())


def test_a_tie_that_the_prediction_loses_is_an_error():
    class Saturated(nn.Module):
        """Class 0 can be led to the score of class 1, and no further."""

        def forward(self, x):
            gap = (x[:, 0] - 0.6).clamp(max=0.0)
            return torch.stack([gap, 0 * gap, gap - 5], -1)[None, None]

    images, labels = torch.full((2, 3), 0.5), torch.ones(2, dtype=torch.int64)
    found = FAB(steps=10)(Saturated(), images, labels, epsilon=0.2).images
    assert bool((Saturated()(found)[0, 0].argmax(-1) == 0).all())
