"""Test APGD against the optimum of a linear model, and against plain PGD where the optimum is not known."""

from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn

from bitquorum import rng
from bitquorum.attacks import APGD, FAB, PGD, APGDTargeted, Loss
from bitquorum.attacks.apgd import checkpoints_of
from bitquorum.attacks.base import Problem
from bitquorum.conversion import Policy, convert
from bitquorum.ensemble import Ensemble
from bitquorum.interface import InputError
from bitquorum.testing import check_attack


def linear_model(features: int = 12, classes: int = 2) -> Ensemble:
    with rng.torch_seed(3):
        return Ensemble([nn.Linear(features, classes)])


def loss_at(model, x, criterion, *, seeds):
    labels, examples = torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))
    return Problem(model=model, images=x, labels=labels, epsilon=0.1, examples=examples).loss(x, criterion, seeds=seeds)


def test_finds_the_corner_that_is_optimal_for_a_linear_model():
    model = linear_model()
    images, labels = torch.rand(20, 12), torch.randint(2, (20,))
    weight = model.members[0].weight.detach()
    direction = (weight[1 - labels] - weight[labels]).sign()
    optimum = (images + 0.1 * direction).clamp(0, 1)
    found = APGD(steps=20)(model, images, labels, epsilon=0.1).images
    assert torch.allclose(found, optimum, atol=1e-6)


def test_reaches_at_least_the_loss_of_pgd_with_as_many_passes():
    with rng.torch_seed(1):
        network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))
    for parameter in network.parameters():
        parameter.data *= 3  # a rough landscape, where a fixed step overshoots
    model = Ensemble([network])
    images, labels = torch.rand(100, 16), torch.randint(5, (100,))
    criterion = PGD()._criterion(labels)

    def mean_loss(attack: APGD | PGD) -> float:
        found = attack(model, images, labels, epsilon=0.2).images
        return float(loss_at(model, found, criterion, seeds=[0]).mean())

    assert mean_loss(APGD(steps=49)) > mean_loss(PGD(steps=50)) - 1e-3


def test_returns_the_point_of_the_largest_loss_it_met():
    model = linear_model(classes=4)
    images, labels = torch.rand(8, 12), torch.randint(4, (8,))
    met: list[torch.Tensor] = []

    def criterion(logits: torch.Tensor) -> torch.Tensor:
        loss = torch.sin(5 * logits[0, 0]).sum(-1)  # many local optima
        met.append(loss.detach())
        return loss

    found = APGD(steps=30)(model, images, labels, epsilon=0.3, criterion=criterion).images
    largest = torch.stack(met).amax(0)
    again = loss_at(model, found, criterion, seeds=[0])
    assert torch.allclose(again, largest, atol=1e-6)


def test_counts_its_passes_and_restarts_never_lower_the_loss():
    model = linear_model(classes=4)
    images, labels = torch.rand(10, 12), torch.randint(4, (10,))
    calls = 0

    def criterion(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += logits.shape[0]
        return torch.sin(5 * logits).sum((0, 1, 3))

    losses = []
    for restarts in (1, 4):
        calls = 0
        result = APGD(steps=10, restarts=restarts, eot=2)(
            model, images, labels, epsilon=0.3, criterion=criterion, seed=5
        )
        assert result.cost.backward == restarts * 11 * 2
        assert calls == result.cost.forward == result.cost.backward + (16 * restarts if restarts > 1 else 0)
        losses.append(loss_at(model, result.images, criterion, seeds=[0, 1]))
    assert torch.all(losses[1] >= losses[0] - 1e-5)


@pytest.mark.parametrize("place", ["start", "later"])
def test_a_loss_that_is_no_number_does_not_stop_the_search(place: str):
    model = linear_model(classes=4)
    images, labels = torch.rand(10, 12), torch.randint(4, (10,))
    calls = 0

    def criterion(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = logits[0, 0, :, 0]
        return loss * torch.nan if calls == (1 if place == "start" else 4) else loss

    found = APGD(steps=20)(model, images, labels, epsilon=0.1, criterion=criterion).images
    gain = model(found)[0, 0, :, 0] - model(images)[0, 0, :, 0]
    room = torch.where(model.members[0].weight[0] > 0, 1 - images, images).clamp(max=0.1)
    assert torch.allclose(gain, (room * model.members[0].weight[0].abs()).sum(1), atol=1e-5)


@pytest.mark.parametrize("attack", [APGD(steps=20, loss="dlr"), APGDTargeted(steps=20), PGD(steps=20, loss="dlr")])
def test_two_classes_have_a_ratio_that_can_be_climbed(attack):
    model = linear_model()
    images, labels = torch.rand(20, 12), torch.randint(2, (20,))
    weight = model.members[0].weight.detach()
    optimum = (images + 0.1 * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)
    assert torch.allclose(attack(model, images, labels, epsilon=0.1).images, optimum, atol=1e-6)


def test_holds_the_contract_of_attacks_on_a_random_network():
    check_attack(APGD(steps=5, eot=2))


@pytest.mark.long
def test_is_as_strong_as_pgd_on_a_stochastic_network_judged_by_unseen_draws():
    with rng.torch_seed(2):
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    model = Ensemble([convert(network, Policy(weight_bits=2, activation_bits=2))])
    images, labels = torch.rand(40, 8), torch.randint(3, (40,))
    judges = list(range(1000, 1200))

    def losses(attack: APGD | PGD) -> torch.Tensor:
        found = attack(model, images, labels, epsilon=0.2).images
        return loss_at(model, found, PGD()._criterion(labels), seeds=judges)

    gain = losses(APGD(steps=39, eot=16)) - losses(PGD(steps=40, eot=16))
    assert gain.mean() > -0.005


def test_checkpoints_lie_inside_the_search_and_come_closer():
    for steps in (5, 20, 50, 100):
        found = sorted(checkpoints_of(steps))
        assert 1 <= found[0] <= found[-1] <= steps
    gaps = [after - before for before, after in pairwise([0, *sorted(checkpoints_of(1000))])]
    assert gaps == [220, 190, 160, 130, 100, 70, 60, 60]


def paper_search(
    start: torch.Tensor, steps: int, value: Callable[[torch.Tensor], torch.Tensor], clip: Callable[..., torch.Tensor]
) -> tuple[list[torch.Tensor], int, int]:
    """Return what algorithm 1 of Croce and Hein visits from a point, and at how many checkpoints it (not) halves."""

    def climbed(x: torch.Tensor, length: float) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        return clip(x.detach() + length * gradient.sign())

    length, before, kept, turned = 0.2, start, 0, 0
    x = climbed(start, length)
    visited, values = [start, x], [float(value(start)), float(value(x))]
    best_value, best = max((values[0], start), (values[1], x), key=lambda pair: pair[0])
    checks = [0, *sorted(checkpoints_of(steps))]
    at_check, halved = values[0], True
    for k in range(1, steps):
        z = climbed(x, length)
        moved = clip(x + 0.75 * (z - x) + 0.25 * (x - before))
        visited.append(moved)
        values.append(float(value(moved)))
        if values[-1] > best_value:
            best_value, best = values[-1], moved
        before, x = x, moved
        if k + 1 in checks:
            last = checks[checks.index(k + 1) - 1]
            rises = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            halve = rises < 0.75 * (k + 1 - last) or (not halved and at_check == best_value)
            if halve:
                length, x, values[-1], turned = length / 2, best, best_value, turned + 1
            kept += not halve
            halved, at_check = halve, best_value
    return visited, turned, kept


def test_visits_the_points_of_the_papers_algorithm():
    images = 0.2 + 0.6 * torch.rand(16, 10, dtype=torch.float64)
    goal = images + 0.1 * (2 * torch.rand(16, 10, dtype=torch.float64) - 1)
    steps, met = 40, []

    class Pixels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            met.append(x.detach().clone())
            return x[None, None]

    def value(x: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        return 0.02 * (40 * x).sin().sum(-1) - (x - goal).abs().sum(-1)

    APGD(steps=steps)(
        Pixels(), images, torch.zeros(16).long(), epsilon=0.1, criterion=lambda logits: value(logits[0, 0], goal)
    )
    assert len(met) == steps + 1
    turned = kept = 0
    for row, image in enumerate(images):
        visited, halvings, others = paper_search(
            met[0][row],
            steps,
            lambda x, row=row: value(x, goal[row]),
            lambda x, image=image: torch.maximum(torch.minimum(x, image + 0.1), image - 0.1).clamp(0, 1),
        )
        turned, kept = turned + halvings, kept + others
        torch.testing.assert_close(torch.stack(met)[:, row], torch.stack(visited), rtol=0, atol=1e-9)
    assert turned > 16
    assert kept > 4


@pytest.mark.parametrize("loss", get_args(Loss))
def test_targeted_breaks_a_linear_model_of_many_classes_wherever_it_can_be_broken(loss: Loss):
    model = linear_model(classes=6)
    weight, bias = model.members[0].weight.detach(), model.members[0].bias.detach()
    images, epsilon = 0.2 + 0.6 * torch.rand(60, 12), 0.02
    logits = images @ weight.T + bias
    labels = logits.argmax(-1)
    reach = (weight[None] - weight[labels][:, None]).abs().sum(-1)
    margins = logits - logits.gather(1, labels[:, None]) + epsilon * reach
    known = margins.scatter(1, labels[:, None], -torch.inf).amax(1)
    found = APGDTargeted(steps=20, targets=0, loss=loss)(model, images, labels, epsilon=epsilon).images
    after = found @ weight.T + bias
    reached = after.scatter(1, labels[:, None], -torch.inf).amax(1) - after.gather(1, labels[:, None])[:, 0]
    assert 0 < int((known > 0).sum()) < 60
    assert torch.equal(reached > 0, known > 0)
    if loss == "margin":
        torch.testing.assert_close(reached, known, rtol=0, atol=1e-5)


def test_refuses_an_empty_search():
    with pytest.raises(InputError, match="at least one step, restart"):
        APGD(steps=0)


def test_returns_the_point_of_the_largest_margin_whatever_loss_it_climbs():
    with rng.torch_seed(1):
        network = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5))
    for parameter in network.parameters():
        parameter.data *= 4
    model = Ensemble([network]).eval().requires_grad_(False)
    images, labels = torch.rand(60, 16), torch.randint(5, (60,))
    problem = Problem(model=model, images=images, labels=labels, epsilon=0.1, examples=torch.arange(60))
    met: list[torch.Tensor] = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            met.append(x.detach().clone())
            return model(x)

    for loss in ("cross-entropy", "dlr"):
        met.clear()
        found = APGD(steps=15, loss=loss)(Watched(), images, labels, epsilon=0.1).images
        margins = torch.stack([problem.loss(x, problem.goal, seeds=[0]) for x in met])
        assert torch.allclose(problem.loss(found, problem.goal, seeds=[0]), margins.amax(0))


@pytest.mark.long
@pytest.mark.parametrize(
    "attack",
    [APGDTargeted(steps=5, eot=3, targets=4, restarts=2), FAB(steps=4, eot=2, targets=4), APGDTargeted(steps=6)],
    ids=lambda attack: attack.label,
)
def test_targets_in_one_batch_change_rounding_alone(attack: APGDTargeted | FAB):
    """As many versions of each image as fit are asked in one pass, and each takes as many passes as before."""
    with rng.torch_seed(4):
        network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))
        images, labels = 0.2 + 0.6 * torch.rand(7, 16), torch.arange(7) % 6
    policy = Policy(weight_bits=4, activation_bits=3)
    model = Ensemble.build([network, network], [policy, policy]).eval().requires_grad_(False)
    asked: list[int] = []
    model.register_forward_pre_hook(lambda module, given: asked.append(len(given[0])))
    found, calls, cost = {}, {}, {}
    for at_once in (0, 20, 100):
        asked.clear()
        result = attack(model, images, labels, epsilon=0.1, examples=torch.arange(7) + 3, seed=5, at_once=at_once)
        found[at_once], cost[at_once], calls[at_once] = result.images, result.cost, len(asked)
        assert max(asked) <= max(at_once, len(images))
    assert torch.allclose(found[0], found[20], atol=1e-4)
    assert torch.allclose(found[0], found[100], atol=1e-4)
    assert cost[0] == cost[20] == cost[100]
    assert calls[100] < calls[20] < calls[0]


def test_a_criterion_of_the_caller_is_climbed_from_other_starts_image_by_image():
    model, starts = linear_model(classes=4), []
    images, labels = torch.rand(3, 12), torch.tensor([0, 1, 2])

    def criterion(logits: torch.Tensor) -> torch.Tensor:
        assert logits.shape[2] == 3
        starts.append(logits.detach())
        return -logits[0, 0].square().sum(-1)

    APGDTargeted(steps=1, targets=3)(model, images, labels, epsilon=0.1, criterion=criterion, at_once=100)
    first, second, third = (starts[call] for call in (0, 2, 6))  # two calls a climb, and two to compare the first ends
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
