"""Test the attacks that tell members apart: where plain gradients fail, against enumeration, and their weights."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import ARC, MORA, PGD
from bitquorum.attacks.ensembles import member_error, reweighed_margin
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.interface import Cost, InputError
from bitquorum.testing import check_attack


def members(*weights: list[list[float]], bias: float = 0.0) -> Ensemble:
    """Return linear members of two classes on two pixels; class 1 where weight . (x - 1/2) + bias > 0."""
    layers = []
    for rows in weights:
        layer = nn.Linear(len(rows[0]), 2)
        layer.weight.data = torch.tensor(rows)
        layer.bias.data = -0.5 * layer.weight.data.sum(1) + torch.tensor([0.0, bias])
        layers.append(layer)
    return Ensemble(layers).eval().requires_grad_(False)


def fooled(model: Ensemble, x: Tensor, labels: Tensor) -> Tensor:
    """Return the number of members that err."""
    return (model(x)[0].argmax(-1) != labels).sum(0)


def worst(model: Ensemble, images: Tensor, labels: Tensor, epsilon: float, cells: int = 40) -> Tensor:
    """Return the largest number of members that a point of a fine grid fools."""
    ticks = torch.linspace(-1, 1, cells + 1)
    grid = torch.tensor(list(itertools.product(ticks.tolist(), repeat=images.shape[1])))
    return torch.stack(
        [fooled(model, (x + epsilon * grid).clamp(0, 1), y).max() for x, y in zip(images, labels, strict=True)]
    )


@pytest.mark.parametrize(
    "attack",
    [ARC(steps=2, eot=2), ARC(steps=2, classes=2, step_size=1.0), MORA(steps=2, eot=2), MORA(steps=2, restarts=2)],
    ids=lambda attack: attack.label,
)
def test_keeps_the_contract(attack):
    check_attack(attack)


def test_arc_fools_a_member_where_the_mean_loss_fools_none():
    # Opposed gradients cancel in the mean and leave the direction in which neither can be fooled.
    model = members([[0.0, 0.0], [1.0, 0.6]], [[0.0, 0.0], [-1.0, 0.6]], bias=-0.12)
    images, labels = torch.full((1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    epsilon = 0.15
    known = worst(model, images, labels, epsilon)
    assert int(known) == 1
    plain = PGD(steps=50, pooling="mean-logits", random_start=False)
    assert int(fooled(model, plain(model, images, labels, epsilon=epsilon).images, labels)) == 0
    assert int(fooled(model, ARC(steps=10)(model, images, labels, epsilon=epsilon).images, labels)) == 1


def team(seed: int, scale: float) -> tuple[Ensemble, Tensor, Tensor]:
    """Return three linear members, images, and what the members say of them together."""
    rows = scale * torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(seed))
    model = members(*rows.tolist())
    images = 0.2 + 0.6 * torch.rand(60, 2, generator=torch.Generator().manual_seed(seed))
    return model, images, model.predict(model(images))[0]


@pytest.mark.long
def test_arc_fools_nearly_as_many_linear_members_as_enumeration_says_can_be_and_more_than_plain_gradients():
    found, known, plain = [], [], []
    for seed in range(4):
        model, images, labels = team(seed, 1.0)
        known.append(worst(model, images, labels, 0.15))
        found.append(fooled(model, ARC(steps=20)(model, images, labels, epsilon=0.15).images, labels))
        plain.append(fooled(model, PGD(steps=50)(model, images, labels, epsilon=0.15).images, labels))
    best, arc, pgd = (float(torch.cat(counts).float().mean()) for counts in (known, found, plain))
    assert arc > 0.93 * best > 1.5
    assert arc > pgd + 0.15


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_mora_fools_more_members_than_the_plain_sum_of_their_gradients(seed: int):
    model, images, labels = team(seed, 20.0)
    mora = MORA(steps=50, restarts=3)(model, images, labels, epsilon=0.15).images
    plain = PGD(steps=50, pooling="mean-member-loss", restarts=3)(model, images, labels, epsilon=0.15).images
    assert float(fooled(model, mora, labels).float().mean()) > float(fooled(model, plain, labels).float().mean()) + 0.05


def test_members_that_are_fooled_stop_pulling():
    labels = torch.tensor([0])
    logits = torch.tensor([[[[0.0, 30.0]], [[1.0, 0.0]]]], requires_grad=True)
    (gradient,) = torch.autograd.grad(reweighed_margin(logits, labels, temperature=1.0).sum(), logits)
    assert float(gradient[0, 0].abs().max()) < 1e-6
    assert float(gradient[0, 1].abs().max()) > 0.1


def test_one_member_that_errs_counts_more_than_any_margin():
    labels = torch.tensor([0])
    near = torch.tensor([[[[0.1, 0.0]], [[0.1, 0.0]], [[0.1, 0.0]]]])
    one = torch.tensor([[[[0.0, 0.1]], [[90.0, 0.0]], [[90.0, 0.0]]]])
    assert float(member_error(one, labels)) > float(member_error(near, labels))


def test_they_count_their_passes():
    policy = Policy(weight_bits=2, activation_bits=2)
    with rng.torch_seed(1):
        network = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    model = Ensemble.build([network, network], [policy, policy]).eval()
    images, labels = torch.rand(4, 8), torch.arange(4) % 3
    arc = ARC(steps=3, eot=5)(model, images, labels, epsilon=0.1).cost
    assert arc == Cost(forward=1 + 3 * 2 * (5 + 2 * 5), backward=3 * 2 * 5)
    mora = MORA(steps=4, eot=5, restarts=2, selection=6)(model, images, labels, epsilon=0.1).cost
    assert mora == Cost(forward=2 * 4 * 5 + 2 * 6, backward=2 * 4 * 5)


def test_labels_name_what_differs_from_the_default():
    assert ARC(steps=5, eot=4, classes=3).label == "ARC-5x4 classes=3"
    assert MORA(steps=10, restarts=2).label == "MORA-10 restarts=2"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ARC(steps=0), "at least one step"),
        (lambda: ARC(step_size=0.0), r"step_size in \(0, 2\]"),
        (lambda: MORA(temperature=0.0), "positive temperature"),
        (lambda: MORA(restarts=0), "at least one restart"),
    ],
)
def test_refuse_budgets_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()
