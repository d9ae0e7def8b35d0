"""Test that the self-checks pass on sound models, and fail on models whose gradients lie, each for its own reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import APGD, FGSM, PGD, Square
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Examples, Ladder, Report, evaluate_model, run_checks
from bitquorum.evaluate.selfchecks import CHECKS, Verdict, _tail
from bitquorum.interface import Listener
from bitquorum.museum.exhibits import network as digits_network

pytestmark = pytest.mark.long

EPSILON = 0.1
LADDER = Ladder(
    name="test",
    claim=PGD(steps=10, eot=4),
    rungs=(PGD(steps=10, eot=4, loss="margin", momentum=0.75), APGD(steps=10, eot=4), Square(queries=20, eot=2)),
    draws=20,
    check_images=24,
)


class Dead(torch.autograd.Function):
    """Return the input; the backward pass says that nothing depends on it."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0 * gradient


class Shattered(torch.autograd.Function):
    """Return the input; the backward pass is noise."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn_like(gradient)


class Around(nn.Module):
    """Call a function with the digits network and the images."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.network = function, digits_network(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.network, x)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from bitquorum.data import load

    test = load("digits", "test").take(60)
    batch = test.batch(torch.arange(60))
    return batch.images, batch.labels


def report_of(function: Callable[[nn.Module, Tensor], Tensor], digits: tuple[Tensor, Tensor], **options) -> Report:
    return evaluate_model(Around(function).eval(), *digits, epsilon=EPSILON, ladder=replace(LADDER, **options))


def failed(report: Report) -> set[str]:
    return {verdict.name for verdict in report.verdicts if verdict.passed is False}


SOUND: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "float": lambda net, x: net(x),
    "noise": lambda net, x: net(x + 0.1 * torch.randn_like(x)),
    "rounded": lambda net, x: net((x * 64).round() / 64),
    "probabilities": lambda net, x: net(x).softmax(-1),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name: str, digits: tuple[Tensor, Tensor]):
    report = report_of(SOUND[name], digits)
    assert report.passed, str(report)
    assert {verdict.name for verdict in report.verdicts} >= {"self-test", "gradients", "large radius", "effort"}
    assert all(verdict.reason for verdict in report.verdicts)


def test_an_ensemble_with_noise_passes_and_its_randomness_is_checked(digits: tuple[Tensor, Tensor]):
    policies = [Policy(weight_bits=4, activation_bits=4), Policy(weight_bits=4, activation_bits=6)]
    model = Ensemble.build([digits_network(0), digits_network(1)], policies).eval().requires_grad_(False)
    few = replace(LADDER, claim=PGD(steps=10, eot=2), rungs=(APGD(steps=10, eot=2),), check_images=16)
    report = evaluate_model(model, digits[0][:30], digits[1][:30], epsilon=EPSILON, ladder=few)
    assert report.passed, str(report)
    assert {verdict.name for verdict in report.verdicts} == set(CHECKS)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda net, x: net(Dead.apply(x)), {"self-test", "gradients", "large radius"}),
        (lambda net, x: net(Shattered.apply(x)), {"self-test", "gradients"}),
        (lambda net, x: net(x + 0.02 * torch.sin(3000 * x)), {"self-test", "gradients"}),
    ],
    ids=["dead", "random", "wrinkled"],
)
def test_models_whose_gradients_lie_fail(
    function: Callable[[nn.Module, Tensor], Tensor], expected: set[str], digits: tuple[Tensor, Tensor]
):
    report = report_of(function, digits)
    assert failed(report) >= expected, str(report)
    assert not report.passed
    assert "FAILED" in str(report)


def test_the_self_test_asks_for_what_random_points_do_not_find(digits: tuple[Tensor, Tensor]):
    (verdict,) = (v for v in report_of(lambda net, x: net(x), digits).verdicts if v.name == "self-test")
    assert verdict.facts["images"] >= 20
    assert verdict.facts["random points"] < 0.5
    assert verdict.facts["PGD-10"] == 1.0


def test_a_self_test_that_noise_hides_is_neither_passed_nor_failed(digits: tuple[Tensor, Tensor]):
    report = report_of(lambda net, x: net(x + 2 * torch.randn_like(x)), digits, check_images=16)
    (verdict,) = (v for v in report.verdicts if v.name == "self-test")
    assert verdict.passed is None, str(report)
    assert verdict.facts["images"] < 4
    assert "self-check self-test: not posed; the noise hides" in str(report)
    assert report.passed, str(report)


def test_cross_entropy_that_rounds_to_zero_is_told(digits: tuple[Tensor, Tensor]):
    report = report_of(lambda net, x: 1e5 * net(x), digits)
    (verdict,) = (v for v in report.verdicts if v.name == "gradients")
    assert verdict.facts["zero_gradients_of_cross_entropy"] > 0.5
    assert "its accuracies mean nothing" in verdict.reason
    assert report.climb.claimed.value > report.climb.worst.value + 0.1


def bench(digits: tuple[Tensor, Tensor], ladder: Ladder, model: nn.Module) -> list[Verdict]:
    images, labels = digits
    examples = Examples(images=images, labels=labels, index=torch.arange(len(labels)))
    climb = ladder(model, examples, epsilon=EPSILON)
    return run_checks(model, examples, ladder, climb)


def test_a_ladder_of_too_few_steps_is_found_out(digits: tuple[Tensor, Tensor]):
    model = Ensemble([digits_network(0)]).eval().requires_grad_(False)
    weak = replace(LADDER, claim=PGD(steps=2, step_size=0.2, random_start=False), rungs=(), check_images=60)
    verdicts = {verdict.name: verdict for verdict in bench(digits, weak, model)}
    assert verdicts["effort"].passed is False
    assert "leave less than the whole ladder" in verdicts["effort"].reason


def test_a_white_box_rung_that_queries_beat_is_found_out(digits: tuple[Tensor, Tensor]):
    weak = replace(LADDER, claim=FGSM(), rungs=(Square(queries=300),), check_images=0)
    images, labels = digits
    examples = Examples(images=images, labels=labels, index=torch.arange(len(labels)))
    model = Ensemble([digits_network(0)]).eval().requires_grad_(False)

    class Backwards(nn.Module):
        stochastic, passes = False, 1

        def forward(self, x: Tensor) -> Tensor:
            logits = model(x)
            return logits.detach() * 2 - logits  # the same values, the opposite gradient

        def predict(self, logits: Tensor) -> Tensor:
            return model.predict(logits)

        def features(self, x: Tensor) -> Tensor:
            return model.outputs(x).features[0].unflatten(0, (-1, len(x)))

    climb = weak(Backwards(), examples, epsilon=EPSILON)
    verdicts = {v.name: v for v in run_checks(Backwards(), examples, replace(weak, check_images=24), climb)}
    assert verdicts["white-box strength"].passed is False
    assert verdicts["gradients"].passed is False
    assert "masked" in verdicts["white-box strength"].reason


class Rare(torch.autograd.Function):
    """Return the input; most images have no gradient."""

    @staticmethod
    def forward(ctx, x, chosen):
        ctx.save_for_backward(chosen)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


def rare(net: nn.Module, x: Tensor) -> Tensor:
    return net(Rare.apply(x, torch.rand(len(x), 1, 1, 1) < 0.1)) + 1e-3 * torch.randn(len(x), 10)


@pytest.mark.parametrize(("name", "eot", "reason"), [("EOT curve", 1, "it still falls"), ("frozen draw", 8, "known")])
def test_gradients_that_few_draws_have_are_found_out(name: str, eot: int, reason: str, digits: tuple[Tensor, Tensor]):
    ladder = replace(LADDER, claim=PGD(steps=10, eot=eot, random_start=False), rungs=(), check_images=60, draws=10)
    report = evaluate_model(Around(rare).eval(), *digits, epsilon=0.2, ladder=ladder)
    (verdict,) = (v for v in report.verdicts if v.name == name)
    assert verdict.passed is False, verdict
    assert reason in verdict.reason
    assert not report.passed


@pytest.mark.parametrize(
    ("nearest", "farthest", "reason"),
    [(0.01, 9.0, "one step leaves less than many"), (0.01, 0.015, "more steps leave more")],
)
def test_steps_that_harm_are_found_out(digits: tuple[Tensor, Tensor], nearest: float, farthest: float, reason: str):
    clean = digits[0].flatten(1)
    model = Ensemble([digits_network(0)]).eval().requires_grad_(False)

    class Misleading(nn.Module):
        """Return the ensemble's logits; their gradient points back at some distances from the image."""

        stochastic, passes = False, 1

        def forward(self, x: Tensor) -> Tensor:
            distance = torch.cdist(x.detach().flatten(1), clean, p=float("inf")).amin(1, keepdim=True)
            logits = model(x)
            back = (distance > nearest) & (distance < farthest)
            return torch.where(back, 2 * logits.detach() - logits, logits)

        def predict(self, logits: Tensor) -> Tensor:
            return model.predict(logits)

        def features(self, x: Tensor) -> Tensor:
            return model.outputs(x).features[0].unflatten(0, (-1, len(x)))

    ladder = replace(LADDER, claim=PGD(steps=10, random_start=False), rungs=(), check_images=60)
    verdicts = {verdict.name: verdict for verdict in bench(digits, ladder, Misleading())}
    assert verdicts["effort"].passed is False
    assert reason in verdicts["effort"].reason, verdicts["effort"]


def test_verdicts_do_not_depend_on_the_order_of_calls(digits: tuple[Tensor, Tensor]):
    model = Ensemble([digits_network(0)]).eval().requires_grad_(False)
    heard: list[tuple[int, str]] = []

    class Ear(Listener):
        def advance(self, done: int, note: str = "") -> None:
            heard.append((done, note))

    images, labels = digits
    examples = Examples(images=images, labels=labels, index=torch.arange(len(labels)))
    climb = LADDER(model, examples, epsilon=EPSILON)
    first = run_checks(model, examples, LADDER, climb, listener=Ear())
    rng.fresh_seed()
    assert run_checks(model, examples, LADDER, climb) == first
    assert heard == [(done, f"of {len(CHECKS)}, {name}") for done, name in enumerate(CHECKS)]


def test_the_binomial_tail_is_that_of_a_sum():
    assert _tail(16, 0, 0.05) == 1.0
    assert _tail(16, 4, 0.05) == pytest.approx(0.007, abs=1e-4)
    assert _tail(5, 5, 0.5) == pytest.approx(1 / 32)
