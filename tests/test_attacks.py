"""Test attacks where the optimum, the gradient or the count of passes is known in closed form."""

import math
from dataclasses import replace
from itertools import pairwise, product
from statistics import fmean
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import FGSM, PGD, Attack, Loss, Pooling, Problem, pooled_loss
from bitquorum.attacks.base import check_choices, check_inputs, targeted_loss
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.geometry import norm_of, project, random_point
from bitquorum.interface import Cost, InputError, Model
from bitquorum.quantizers import Law, Logistic, Quantizer, StochasticRounding, Surrogate
from bitquorum.quantizers.surrogate import ambient

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
LOSSES: tuple[Loss, ...] = get_args(Loss)
EOT = PGD(steps=10, eot=4, restarts=2, selection=4)


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(weight: Tensor, bias: Tensor | None = None) -> Ensemble:
    """Return a noise-free model of one linear layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).to(weight.dtype)
    layer.weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(bias)
    return Ensemble([nn.Sequential(nn.Flatten(), layer)])


def problem_of(model: Model, x: Tensor, examples: Tensor | None = None) -> Problem:
    """Return a problem through which a test asks the model."""
    examples = torch.arange(len(x)) if examples is None else examples
    return Problem(model=model, images=x, labels=torch.zeros(len(x), dtype=torch.int64), epsilon=0.1, examples=examples)


def pixels(images: Tensor) -> Tensor:
    """Return the pixels as logits of one draw and one member, for criteria written in pixels."""
    return images.flatten(1)[None, None]


class RandomLinear:
    """Add to the weights noise that is a multiple of 1/8, so that sums over draws are exact."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def weights(self) -> Tensor:
        return self.weight + (rng.uniform_per_draw(self.weight, "weight") * 8).floor() / 8

    def __call__(self, images: Tensor, /) -> Tensor:
        return torch.stack([images.flatten(1) @ w.T for w in self.weights()])[:, None]


class _Tap(torch.autograd.Function):
    """Pass a tensor through and count its backward passes."""

    @staticmethod
    def forward(ctx, x: Tensor, counter: "Counting", draws: int) -> Tensor:
        ctx.counter, ctx.draws = counter, draws
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.counter.backward += ctx.draws
        return gradients[0], None, None


class Counting:
    """Count the passes over each image that a model is asked for, and remember what was ambient."""

    def __init__(self, model: Model) -> None:
        self.model, self.forward, self.backward = model, 0, 0
        self.seeds: list[tuple[int, ...]] = []
        self.surrogates: list[Surrogate | None] = []

    def __call__(self, images: Tensor, /) -> Tensor:
        draw = rng.current()
        assert draw is not None
        self.forward += len(draw.seeds)
        self.seeds.append(draw.seeds)
        self.surrogates.append(ambient())
        return self.model(_Tap.apply(images, self, len(draw.seeds)))


def small_network(seed: int, law: Law, *, bits: int = 2, inputs: int = 12, classes: int = 4) -> Ensemble:
    """Return two members with random weights in float64 and random weight and activation noise."""
    with rng.torch_seed(seed):
        networks = [
            nn.Sequential(nn.Flatten(), nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, classes)) for _ in range(2)
        ]
    policy = Policy(weight_bits=bits, activation_bits=bits, weight_law=law, activation_law=law)
    return Ensemble.build(networks, [policy, policy]).double().eval().requires_grad_(False)


# The optimum of a linear model


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=7), PGD(steps=7, momentum=1.0), PGD(loss="margin"), EOT])
@pytest.mark.parametrize("box", [False, True])
def test_two_class_linear_optimum(attack: Attack, box: bool):
    weight, epsilon = normal(0, 2, 12), 0.1
    weight[:, 3] = 0  # this pixel has no gradient
    x = uniform(1, 40, 3, 2, 2)
    x = x.round() if box else 0.2 + 0.6 * x
    labels = torch.arange(40) % 2
    found = attack(linear(weight), x, labels, epsilon=epsilon, seed=5).images
    rise = (weight[1 - labels] - weight[labels]).view_as(x)
    best = (x + epsilon * rise.sign()).clamp(0, 1)
    moves = (rise != 0) | isinstance(attack, FGSM)  # a random start leaves the rest where it fell
    assert torch.equal(found[moves], project(best, x, epsilon, "linf")[moves])
    if not box:
        margin = -((x * rise).flatten(1).sum(1))
        survives = margin > epsilon * rise.flatten(1).abs().sum(1)
        right = linear(weight)(found)[0, 0].argmax(1) == labels
        assert torch.equal(right, survives)
        assert 0 < survives.sum() < 40


def test_many_class_margin_never_exceeds_the_optimum_and_nearly_reaches_it():
    weight, x, labels, epsilon = normal(2, 5, 30), 0.3 + 0.4 * uniform(3, 60, 30), torch.arange(60) % 5, 0.1
    found = PGD(steps=20, loss="margin", restarts=4)(linear(weight), x, labels, epsilon=epsilon).images
    difference = weight[None] - weight[labels][:, None]  # [batch, classes, pixels]
    bound = (difference * x[:, None]).sum(-1) + epsilon * difference.abs().sum(-1)
    optimum = bound.scatter(1, labels[:, None], -torch.inf).amax(1)
    reached = pooled_loss(linear(weight)(found), labels, loss="margin", pooling="mean-loss")
    assert bool((reached <= optimum + 1e-5).all())
    assert (reached > optimum - 1e-4).float().mean() > 0.9


def test_saturated_pixels_keep_their_gradient():
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5]])
    weight = torch.tensor([[1.0, 2.0, -3.0, -4.0, 5.0]])
    gradient, loss = problem_of(linear(weight), x).gradient(x, lambda logits: logits.sum((0, 1, 3)), seeds=[0])
    assert torch.equal(gradient, weight)
    assert loss.item() == 0.5


def test_a_pixel_that_was_pushed_against_the_box_comes_back():
    """The first pixel rises beyond 1 until the second has passed 1/4; then it must fall by all of epsilon."""
    x = torch.tensor([[1.0, 0.2]])
    attack = PGD(steps=20, random_start=False)

    def criterion(logits: Tensor) -> Tensor:
        first, second = logits[0, 0].unbind(1)
        return first * (1 - 4 * second) + 10 * second

    found = attack(pixels, x, torch.tensor([0]), epsilon=0.3, criterion=criterion).images
    torch.testing.assert_close(found, torch.tensor([[0.7, 0.5]]))


# Steps, momentum, restarts


@pytest.mark.parametrize(("momentum", "first"), [(0.0, 0.5), (1.0, 0.5), (3.0, 0.7)])
def test_momentum_accumulates_gradients_of_unit_mean_magnitude(momentum: float, first: float):
    """Gradients (1, 3)/1000, then (-1, 1): normalized (0.5, 1.5) and (-1, 1), so 3 x 0.5 outweighs 1."""
    attack = PGD(steps=2, step_size=0.5, random_start=False, momentum=momentum)

    def criterion(logits: Tensor) -> Tensor:
        first, second = logits[0, 0].unbind(1)
        return torch.where(first < 0.55, (first + 3 * second) / 1000, second - first)

    found = attack(pixels, torch.full((1, 2), 0.5), torch.tensor([0]), epsilon=0.2, criterion=criterion).images
    torch.testing.assert_close(found, torch.tensor([[first, 0.7]]))


def test_step_size_and_start():
    model, x, labels = linear(torch.tensor([[1.0], [-1.0]])), torch.full((1, 1), 0.5), torch.tensor([0])
    for attack, distance in (
        (PGD(steps=1, step_size=0.25, random_start=False), 0.25),
        (PGD(steps=3, step_size=0.25, random_start=False), 0.75),
        (PGD(steps=5, random_start=False), 1.0),
        (PGD(steps=1, random_start=False), 1.0),
    ):
        found = attack(model, x, labels, epsilon=0.2).images
        torch.testing.assert_close(found, x - 0.2 * distance)
    starts = random_point(torch.full((400, 1), 0.5), 0.2, "linf", seed=1, examples=torch.arange(400))
    assert abs(float(starts.mean()) - 0.5) < 4 * 0.2 / math.sqrt(3 * 400)
    assert 0.69 < float(starts.max()) <= 0.7
    assert 0.3 <= float(starts.min()) < 0.31
    once = PGD(steps=1, step_size=0.01)(model, torch.full((400, 1), 0.5), torch.zeros(400).long(), epsilon=0.2)
    assert float(once.images.std()) > 0.1


def test_restarts_find_the_higher_of_two_peaks():
    """Left of the centre the loss has a peak of height 1, right of it one of height 2."""
    x, labels = torch.full((64, 1), 0.5), torch.zeros(64, dtype=torch.int64)

    def criterion(logits: Tensor) -> Tensor:
        z = logits[0, 0, :, 0] - 0.5
        return torch.where(z < 0, 1 - 20 * (z + 0.1).abs(), 2 - 20 * (z - 0.1).abs())

    def high(restarts: int) -> float:
        attack = PGD(steps=20, restarts=restarts, selection=1)
        found = attack(pixels, x, labels, epsilon=0.2, criterion=criterion).images
        return float((found > 0.5).float().mean())

    assert 0.25 < high(1) < 0.75
    assert high(10) == 1.0


def test_more_restarts_never_lower_the_loss_on_the_common_draws():
    model, x, labels = small_network(0, Logistic()), uniform(4, 20, 12).double(), torch.arange(20) % 4
    base, examples = PGD(steps=3, eot=2, selection=8), torch.arange(20)
    judges = rng.derive_many(7, base.selection, "selection")
    values = []
    for restarts in (1, 2, 4):
        attack = replace(base, restarts=restarts)
        found = attack(model, x, labels, epsilon=0.1, seed=7).images
        criterion = attack._criterion(labels)
        values.append(problem_of(model, found, examples).loss(found, criterion, seeds=judges))
    assert bool((values[1] >= values[0]).all() and (values[2] >= values[1]).all())
    assert bool((values[2] > values[0]).any())


# Expectation over draws


def test_the_gradient_over_draws_is_the_mean_of_the_draws_gradients_bit_for_bit():
    model = RandomLinear((normal(5, 3, 12) * 8).round() / 8)
    x, seeds, examples = uniform(6, 5, 12), rng.derive_many(3, 8, "draws"), torch.arange(5)

    def criterion(logits: Tensor) -> Tensor:
        return (logits[..., 0] - logits[..., 1]).mean((0, 1))

    def gradient(chosen: list[int]) -> Tensor:
        return problem_of(model, x, examples).gradient(x, criterion, seeds=chosen)[0]

    with rng.draw(seeds):
        weights = model.weights()
    known = (weights[:, 0] - weights[:, 1]).mean(0).expand_as(x)
    assert torch.equal(gradient(seeds), known)
    assert torch.equal(torch.stack([gradient([seed]) for seed in seeds]).mean(0), known)
    assert not torch.equal(gradient(seeds[:1]), gradient(seeds[1:2]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_only_the_mean_probability_is_not_a_mean_of_loss_gradients(pooling: Pooling):
    model, x, labels = RandomLinear(2 * normal(7, 3, 12)).__call__, uniform(8, 5, 12).double(), torch.arange(5) % 3
    attack = PGD(eot=3, pooling=pooling)
    seeds, examples = rng.derive_many(1, 3), torch.arange(5)

    def model64(images: Tensor) -> Tensor:
        return model(images.float()).double()

    def gradient(chosen: list[int]) -> Tensor:
        criterion = attack._criterion(labels)
        return problem_of(model64, x, examples).gradient(x, criterion, seeds=chosen)[0]

    mean = torch.stack([gradient([seed]) for seed in seeds]).mean(0)
    assert torch.allclose(gradient(seeds), mean, rtol=1e-5, atol=1e-6) == (pooling != "mean-probability")


def test_every_step_and_restart_draws_afresh_and_selection_is_common():
    model = Counting(RandomLinear(normal(9, 2, 4)))
    attack = PGD(steps=3, eot=2, restarts=2, selection=5)
    attack(model, uniform(10, 3, 4), torch.tensor([0, 1, 0]), epsilon=0.1)
    gradient_seeds = [seed for seeds in model.seeds if len(seeds) == 2 for seed in seeds]
    selection = [seeds for seeds in model.seeds if len(seeds) == 5]
    assert len(set(gradient_seeds)) == 3 * 2 * 2
    assert len(selection) == 2
    assert selection[0] == selection[1]
    assert not set(selection[0]) & set(gradient_seeds)


def test_more_draws_attack_a_stochastic_rounding_network_at_least_as_well():
    with rng.torch_seed(3):
        first, last = nn.Linear(128, 32), nn.Linear(32, 4)
    first.weight.data.mul_(3)
    last.weight.data.mul_(8)
    law = StochasticRounding()
    policy = Policy(weight_bits=1, activation_bits=2, weight_law=law, activation_law=law)
    model = Ensemble.build([nn.Sequential(first, nn.ReLU(), last)], [policy]).eval().requires_grad_(False)
    x, examples = uniform(11, 100, 128), torch.arange(100)

    def probabilities(images: Tensor) -> Tensor:
        with rng.draw(rng.derive_many(99, 100, "judge"), examples):
            choice = model(images)[:, 0].argmax(-1)
        return nn.functional.one_hot(choice, 4).float().mean(0)

    labels = probabilities(x).argmax(1)
    left = []
    for draws in (1, 4, 16):
        found = PGD(steps=10, eot=draws)(model, x, labels, epsilon=0.1, examples=examples)
        left.append(probabilities(found.images).gather(1, labels[:, None])[:, 0])
    for fewer, more in pairwise(left):
        gain = fewer - more  # on common draws, image by image
        assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(len(gain))


# The loss


def hand_loss(
    logits: Tensor, labels: Tensor, loss: Loss, pooling: Pooling, targets: Tensor | None = None
) -> list[float]:
    """Compute the pooled loss number by number, with targets that towards them."""
    draws, members, batch, classes = logits.shape
    p = logits.softmax(-1)

    def of(probability: list[float], label: int, target: int | None) -> float:
        z = [math.log(q) for q in probability]
        first, second, *others = sorted(z, reverse=True)
        towards = max(value for c, value in enumerate(z) if c != label) if target is None else z[target]
        if loss.endswith("cross-entropy"):
            heat = max(1.0, first - second) if loss == "scaled-cross-entropy" else 1.0
            wanted, sign = (label, -1) if target is None else (target, 1)
            return sign * (z[wanted] / heat - math.log(sum(math.exp(value / heat) for value in z)))
        if loss == "margin":
            return towards - z[label]
        last = others[0] if target is None else sum(others[:2]) / 2
        return (towards - z[label]) / (first - last)

    def softmax(values: list[float]) -> list[float]:
        total = sum(math.exp(v) for v in values)
        return [math.exp(v) / total for v in values]

    result = []
    for n in range(batch):
        views = {
            "mean-loss": [[float(p[t, :, n, c].mean()) for c in range(classes)] for t in range(draws)],
            "mean-probability": [[float(p[:, :, n, c].mean()) for c in range(classes)]],
            "mean-logits": [softmax([float(logits[t, :, n, c].mean()) for c in range(classes)]) for t in range(draws)],
        }
        asked = int(labels[n]), None if targets is None else int(targets[n])
        if pooling in views:
            result.append(fmean(of(view, *asked) for view in views[pooling]))
        else:
            each = [[of(p[t, m, n].tolist(), *asked) for m in range(members)] for t in range(draws)]
            join = {"mean-member-loss": fmean, "least-member-loss": min}[pooling]
            result.append(fmean(join(found) for found in each))
    return result


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_pooled_loss_by_hand(loss: Loss, pooling: Pooling):
    logits, labels = 2 * normal(12, 3, 2, 4, 5).double(), torch.tensor([0, 4, 2, 2])
    got = pooled_loss(logits, labels, loss=loss, pooling=pooling)
    known = torch.tensor(hand_loss(logits, labels, loss, pooling), dtype=torch.float64)
    torch.testing.assert_close(got, known, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_targeted_loss_by_hand(loss: Loss, pooling: Pooling):
    logits, labels, targets = (
        2 * normal(12, 3, 2, 4, 5).double(),
        torch.tensor([0, 4, 2, 2]),
        torch.tensor([3, 0, 1, 4]),
    )
    got = targeted_loss(logits, labels, targets, loss=loss, pooling=pooling)
    known = torch.tensor(hand_loss(logits, labels, loss, pooling, targets), dtype=torch.float64)
    torch.testing.assert_close(got, known, rtol=1e-12, atol=1e-12)


def test_pooled_loss_is_finite_and_graded_for_hopeless_logits():
    logits = torch.tensor([[[[400.0, 0.0, -400.0]]]], requires_grad=True)
    for loss, pooling in product(LOSSES, POOLINGS):
        value = pooled_loss(logits, torch.tensor([0]), loss=loss, pooling=pooling)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert bool(value.isfinite().all())
        assert bool(gradient.isfinite().all())
        if loss == "margin":
            assert value.item() == -400
            assert gradient.flatten().tolist() == [-1, 1, 0]


def test_a_criterion_takes_the_place_of_the_loss():
    weight, x, labels = normal(13, 3, 6), 0.5 + 0 * uniform(14, 4, 6), torch.tensor([0, 1, 2, 0])
    for attack in (FGSM(loss="margin"), PGD(steps=4, restarts=2), PGD(steps=4, pooling="mean-logits")):
        found = attack(
            linear(weight), x, labels, epsilon=0.2, criterion=lambda logits: -logits[..., 1].mean((0, 1))
        ).images
        torch.testing.assert_close(found, x - 0.2 * weight[1].sign())


# Surrogates


def test_the_surrogate_reaches_the_quantizers_and_leaves_the_forward_pass_alone():
    rho, x = 0.25, torch.tensor([[0.5, 1.1, 2.4]]) / 4
    quantizer = Quantizer(2, high=0.75, law=Logistic(scale=rho))
    weight = torch.tensor([[1.0, -2.0, 3.0]])
    model = Ensemble([nn.Sequential(quantizer, *linear(weight).members)]).requires_grad_(False)

    def run(surrogate: Surrogate) -> tuple[Tensor, Tensor]:
        return problem_of(model, x).gradient(x, lambda logits: logits.sum((0, 1, 3)), seeds=[1], surrogate=surrogate)

    def slope(scale: float) -> Tensor:
        z = x.double() * 4
        p = torch.stack([((z - k - 0.5) / scale).sigmoid() for k in range(3)])
        return (weight * (p * (1 - p)).sum(0) / scale).float()

    losses = []
    for surrogate, gradient in (
        (Surrogate(), slope(rho)),
        (Surrogate(backward="mean"), slope(rho)),
        (Surrogate(backward="mean", width=3.0), slope(3 * rho)),
        (Surrogate(backward="straight-through"), weight),
    ):
        got, loss = run(surrogate)
        torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-5)
        losses.append(loss.item())
    assert len(set(losses)) == 1


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=2, restarts=2, selection=3)])
def test_every_gradient_pass_shows_the_surrogate(attack: Attack):
    surrogate = Surrogate(backward="gumbel", temperature=0.3)
    model = Counting(linear(normal(15, 2, 4)))
    replace(attack, surrogate=surrogate)(model, uniform(16, 2, 4), torch.tensor([0, 1]), epsilon=0.1)
    assert [shown for shown in model.surrogates if shown is not None] == [surrogate] * model.backward
    assert ambient() is None


# What every attack promises

ATTACKS = (
    FGSM(),
    FGSM(eot=3, loss="margin", pooling="mean-probability"),
    PGD(steps=4),
    PGD(steps=3, random_start=False, momentum=0.9, pooling="mean-logits"),
    PGD(steps=3, eot=2, restarts=3, selection=4, pooling="mean-member-loss"),
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_cost_is_the_number_of_passes_made(attack: Attack):
    model = Counting(RandomLinear(normal(17, 3, 6)))
    result = attack(model, uniform(18, 4, 6), torch.tensor([0, 1, 2, 0]), epsilon=0.1)
    assert result.cost == Cost(forward=model.forward, backward=model.backward)
    assert result.cost.backward > 0


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("law", [Logistic(), StochasticRounding()])
def test_the_batch_and_the_place_in_it_change_nothing(attack: Attack, law: Law):
    model, x, labels = small_network(1, law), uniform(19, 9, 12).double(), torch.arange(9) % 4
    examples = torch.arange(9) * 17 + 3

    def run(chosen: Tensor) -> Tensor:
        return attack(model, x[chosen], labels[chosen], epsilon=0.1, examples=examples[chosen], seed=2).images

    whole = run(torch.arange(9))
    order = torch.tensor([8, 2, 5, 0, 1, 7, 3, 6, 4])
    assert torch.equal(torch.cat([run(part) for part in torch.arange(9).split(4)]), whole)
    assert torch.equal(run(order), whole[order])


@pytest.mark.parametrize("attack", ATTACKS)
def test_equal_calls_give_equal_images_and_touch_nothing(attack: Attack):
    model, x, labels = small_network(2, Logistic()), uniform(20, 6, 12).double(), torch.arange(6) % 4
    before, ambient_state = x.clone(), torch.random.get_rng_state()
    first = attack(model, x, labels, epsilon=0.1, seed=1)
    assert torch.equal(first.images, attack(model, x, labels, epsilon=0.1, seed=1).images)
    assert not torch.equal(first.images, attack(model, x, labels, epsilon=0.1, seed=2).images)
    assert torch.equal(x, before)
    assert not first.images.requires_grad
    assert torch.equal(torch.random.get_rng_state(), ambient_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.long
@given(
    attack=st.sampled_from(ATTACKS),
    epsilon=st.floats(0, 1, width=32),
    values=st.lists(st.sampled_from([0.0, 1.0, 0.5, 1e-8, 1 - 2**-24, 0.3]), min_size=6, max_size=6),
    seed=st.integers(0, 99),
)
def test_images_stay_within_epsilon_and_the_box(attack: Attack, epsilon: float, values: list[float], seed: int):
    x, model = torch.tensor(values).view(2, 1, 1, 3), RandomLinear(normal(seed, 3, 3))
    found = attack(model, x, torch.tensor([seed % 3, 1]), epsilon=epsilon, seed=seed).images
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert float(norm_of(found - x, "linf").max()) <= epsilon + 2**-23
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_epsilon_zero_returns_a_copy_for_nothing(attack: Attack):
    model, x = Counting(linear(normal(21, 2, 4))), uniform(22, 2, 4)
    result = attack(model, x, torch.tensor([0, 1]), epsilon=0.0)
    assert torch.equal(result.images, x)
    assert result.images.data_ptr() != x.data_ptr()
    assert result.cost == Cost()
    assert model.forward == 0


def test_a_model_in_use_by_its_owner_still_trains():
    weight = normal(23, 2, 4)
    model = linear(weight)
    with torch.no_grad():  # as an evaluation may well call it
        found = PGD(steps=2)(model, uniform(24, 2, 4), torch.tensor([0, 1]), epsilon=0.1).images
    assert all(parameter.grad is None for parameter in model.parameters())
    model(found).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_projection():
    x = uniform(25, 50, 3)
    z = x + normal(26, 50, 3)
    found = project(z, x, 0.1, "linf")
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    assert torch.equal(found, torch.minimum(torch.maximum(z, low), high))
    assert torch.equal(project(found, x, 0.1, "linf"), found)
    assert norm_of(torch.tensor([[[0.1, -0.5]], [[0.2, 0.0]]]), "linf").tolist() == pytest.approx([0.5, 0.2])


# Errors and names


@pytest.mark.parametrize(
    ("images", "labels", "epsilon", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2).long(), 0.1, "float batch"),
        (torch.zeros(2), torch.zeros(2).long(), 0.1, "float batch"),
        (torch.tensor([[0.5, torch.nan]]), torch.zeros(1).long(), 0.1, "finite images"),
        (torch.tensor([[0.5, torch.inf]]), torch.zeros(1).long(), 0.1, "finite images"),
        (torch.tensor([[-0.01, 1.0]]), torch.zeros(1).long(), 0.1, "divide bytes by 255"),
        (torch.tensor([[0.0, 255.0]]), torch.zeros(1).long(), 0.1, "divide bytes by 255"),
        (torch.zeros(2, 3), torch.zeros(3).long(), 0.1, "labels of shape"),
        (torch.zeros(2, 3), torch.zeros(2), 0.1, "int64 labels"),
        (torch.zeros(2, 3), torch.zeros(2).int(), 0.1, "int64 labels"),
        (torch.zeros(2, 3), torch.zeros(2).long(), -0.1, "epsilon in"),
        (torch.zeros(2, 3), torch.zeros(2).long(), 8.0, "epsilon in"),
        (torch.zeros(2, 3), torch.zeros(2).long(), math.nan, "epsilon in"),
    ],
)
def test_bad_input(images: Tensor, labels: Tensor, epsilon: float, message: str):
    with pytest.raises(InputError, match=message):
        check_inputs(images, labels, epsilon)


def test_an_attack_checks_its_input():
    model = Counting(linear(normal(27, 2, 3)))
    with pytest.raises(InputError, match="divide bytes"):
        FGSM()(model, torch.full((1, 3), 2.0), torch.tensor([0]), epsilon=0.1)
    with pytest.raises(InputError, match="epsilon"):
        PGD()(model, torch.zeros(1, 3), torch.tensor([0]), epsilon=-1 / 255)
    assert model.forward == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FGSM, {"eot": 0}, "eot"),
        (PGD, {"eot": -1}, "eot"),
        (PGD, {"steps": 0}, "at least one step"),
        (PGD, {"restarts": 0}, "restart"),
        (PGD, {"selection": 0}, "selection"),
        (PGD, {"step_size": 0.0}, "step_size"),
        (PGD, {"step_size": -1.0}, "step_size"),
        (PGD, {"momentum": -0.1}, "momentum"),
        (PGD, {"momentum": 10.0}, "momentum"),
    ],
)
def test_bad_settings(kind: type[FGSM] | type[PGD], options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        kind(**options)


@pytest.mark.parametrize(("loss", "pooling"), [("hinge", "mean-loss"), ("margin", "median")])
def test_unknown_choices(loss: str, pooling: str):
    with pytest.raises(InputError, match=r"expected a (loss|pooling) among .*, got '(hinge|median)'"):
        check_choices(loss, pooling)


def test_labels_state_the_budget():
    attacks = (FGSM(), FGSM(eot=4), PGD(), PGD(steps=7, eot=10), PGD(restarts=3), PGD(eot=2, restarts=5))
    assert [attack.label for attack in attacks] == [
        "FGSM",
        "EOT-FGSM x4",
        "PGD-20",
        "EOT-PGD-7x10",
        "PGD-20 r3",
        "EOT-PGD-20x2 r5",
    ]


def test_labels_tell_attacks_apart_by_every_choice():
    variants = [
        PGD(),
        PGD(loss="margin"),
        PGD(pooling="mean-probability"),
        PGD(surrogate=Surrogate(backward="straight-through")),
        PGD(surrogate=Surrogate(width=2.0)),
        PGD(surrogate=Surrogate(backward="gumbel", temperature=0.3)),
        PGD(step_size=0.1),
        PGD(momentum=0.9),
        PGD(random_start=False),
        PGD(restarts=2),
        PGD(eot=2),
        FGSM(),
        FGSM(loss="margin"),
    ]
    assert len({attack.label for attack in variants}) == len(variants)
    assert PGD(loss="margin", surrogate=Surrogate(width=2.0)).label == "PGD-20 margin width=2"
