"""Run the contract checks over every attack and estimator, and on implementations that break one promise each."""

import copy
from abc import ABC
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
from torch import nn

from bitquorum import rng
from bitquorum.attacks import FGSM, PGD
from bitquorum.information import Estimate, PlugIn, binary_symmetric_channel, mutual_information
from bitquorum.interface import BitquorumError
from bitquorum.quantizers import Law, Quantizer, StochasticRounding, Surrogate
from bitquorum.testing import ContractError, check_attack, check_estimator, check_quantizer

CHANNEL = binary_symmetric_channel(0.1)
BITS = float(mutual_information(CHANNEL))


def channel(n, generator):
    cell = torch.multinomial(CHANNEL.flatten(), n, replacement=True, generator=generator)
    return cell // 2, cell % 2


@pytest.mark.parametrize(
    "attack",
    [
        FGSM(),
        FGSM(eot=3, loss="margin", pooling="mean-member-loss"),
        PGD(steps=3),
        PGD(steps=2, restarts=3, eot=2, momentum=0.9, pooling="mean-probability"),
        PGD(steps=2, random_start=False, surrogate=Surrogate(backward="straight-through")),
    ],
    ids=lambda attack: attack.label,
)
def test_attacks(attack):
    check_attack(attack)


def test_an_attack_on_a_model_of_ones_own():
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, images):
            ambient = rng.current()
            return self.linear(images)[None, None].expand(len(ambient.seeds) if ambient else 1, -1, -1, -1)

    check_attack(PGD(steps=2), model=Line(), images=torch.rand(4, 4), labels=torch.tensor([0, 1, 1, 0]), epsilon=0.02)


@pytest.mark.parametrize("correction", ["none", "miller-madow"])
def test_estimators(correction):
    check_estimator(PlugIn(correction=correction), channel, BITS, tolerance=0.002)


# What a check must find. Methods of real classes are broken, and laws are marked abstract: none may stay registered.


class Mine(Law, ABC):
    """Round at random: a law that the kernels do not know."""

    stochastic: ClassVar[bool] = True
    smooth: ClassVar[bool] = False

    def sample(self, u, scale):
        return u - 0.5

    def cdf(self, y, scale):
        return (y + 0.5).clamp(0, 1)


class Biased(Mine, ABC):
    def sample(self, u, scale):
        return u - 0.4


class Leaky(Mine, ABC):
    def sample(self, u, scale):
        return u - 0.5 + 1e-9 * torch.rand(())


class Drifting(Mine, ABC):
    def sample(self, u, scale):
        return torch.rand_like(u) - 0.5


class Calm(Mine, ABC):
    def sample(self, u, scale):
        return 0 * u


class Crowded(Mine, ABC):
    def sample(self, u, scale):
        return (u + 0.1 * u.flip(0)).remainder(1) - 0.5


class Heavy(Mine, ABC):
    def cdf(self, y, scale):
        return (y + 0.6).clamp(0, 1)


class Narrow(Mine, ABC):
    def cdf(self, y, scale):
        return (2 * y + 0.5).clamp(0, 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("law", "message"),
    [
        (Biased, "draws that follow"),
        (Leaky, "torch's generator"),
        (Drifting, "codes that decode"),
        (Calm, "draws that differ only if"),
        (Crowded, "the place in the batch"),
        (Heavy, "sum to one"),
        (Narrow, "draws that follow"),
    ],
)
def test_broken_laws_are_found(law, message):
    check_quantizer(Quantizer(3, law=Mine()), draws=200)
    with pytest.raises(ContractError, match=message):
        check_quantizer(Quantizer(3, law=law()), draws=200)


def test_a_quantizer_off_its_grid_is_found(monkeypatch):
    quantizer = Quantizer(3, law=StochasticRounding())
    original = Quantizer.forward
    monkeypatch.setattr(Quantizer, "forward", lambda self, x, **options: original(self, x, **options) + 1e-7)
    with pytest.raises(ContractError, match="decode to the values"):
        check_quantizer(quantizer)


def stepping(fault):
    """Return an attack's `_run` that takes one signed step, wrong in the way that `fault` names."""

    def run(self, problem):
        images, epsilon, model = problem.images, problem.epsilon, problem.model
        criterion = problem.criterion or self._criterion(problem.labels)
        leaf = images.clone().requires_grad_()
        context = nullcontext() if fault == "draw" else rng.draw(problem.seed, problem.examples)
        with context:
            logits = model(leaf)
        loss = logits.square().sum((0, 1, 3)) if fault == "criterion" else criterion(logits)
        if fault == "parameters":
            loss.sum().backward(retain_graph=True)
        gradient = leaf.grad if fault == "parameters" else torch.autograd.grad(loss.sum(), leaf)[0]
        if fault == "batch":
            gradient = gradient - gradient.mean(0)
        if fault == "generator":
            gradient = torch.randn_like(gradient)
        gradient = -gradient if fault == "sign" else gradient
        found = images + (2 if fault == "radius" else 1) * epsilon * gradient.sign()
        found = found if fault == "box" else found.clamp(0, 1)
        if fault == "in place":
            images.copy_(found)
        found = found.float() if fault == "type" else found
        problem.meter.add(forward=1, backward=2 if fault == "cost" else 1)
        return found

    return run


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("draw", "inside `rng.draw"),
        ("criterion", "caller's criterion"),
        ("sign", "raises the caller's criterion"),
        ("parameters", "no gradient left"),
        ("batch", "do not depend on the batch"),
        ("generator", "torch's generator"),
        ("radius", "perturbation of at most"),
        ("box", r"images in \[0, 1\]"),
        ("in place", "left alone"),
        ("type", "plain torch.float64"),
        ("cost", "a cost of"),
    ],
)
def test_broken_attacks_are_found(monkeypatch, fault, message):
    monkeypatch.setattr(FGSM, "_run", stepping(""))
    with pytest.raises(ContractError, match=r"at most 0\.1 in l2"):
        check_attack(FGSM())
    monkeypatch.setattr(FGSM, "norms", ("linf",))
    check_attack(FGSM())
    monkeypatch.setattr(FGSM, "_run", stepping(fault))
    with pytest.raises(ContractError, match=message):
        check_attack(FGSM())


def test_an_attack_without_a_label_is_found(monkeypatch):
    monkeypatch.setattr(FGSM, "label", "")
    with pytest.raises(ContractError, match="a label"):
        check_attack(FGSM())


def test_an_attack_that_takes_bad_images_is_found(monkeypatch):
    monkeypatch.setattr("bitquorum.attacks.base.check_inputs", lambda *_: None)
    with pytest.raises(ContractError, match=r"an InputError for images beyond \[0, 1\]"):
        check_attack(FGSM())


def estimating(fault, original=PlugIn.__call__):
    """Return an estimator's `__call__`, wrong in the way that `fault` names."""

    def call(self, a, b):
        if fault == "unpaired":
            a, b = a[: min(len(a), len(b))], b[: min(len(a), len(b))]
        if fault == "in place":
            a.zero_()
        found = original(self, a, b)
        bias = {"random": float(torch.randn(())) if fault == "random" else 0.0, "biased": 0.1}.get(fault, 0.0)
        return Estimate(
            value=found.value + bias,
            standard_error=0.0 if fault == "sure" else found.standard_error,
            samples=found.samples + (fault == "count"),
        )

    return call


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unpaired", "not paired"),
        ("in place", "left alone"),
        ("random", "torch's generator"),
        ("biased", "a mean of at most"),
        ("sure", "a standard error near"),
        ("count", "from 1000 samples"),
    ],
)
def test_broken_estimators_are_found(monkeypatch, fault, message):
    monkeypatch.setattr(PlugIn, "__call__", estimating(fault))
    with pytest.raises(ContractError, match=message):
        check_estimator(PlugIn(), channel, BITS)


def test_bounds_are_one_sided(monkeypatch):
    for bound, ok, wrong in (("lower", BITS + 0.2, BITS - 0.2), ("upper", BITS - 0.2, BITS + 0.2)):
        monkeypatch.setattr(PlugIn, "bound", bound)
        check_estimator(PlugIn(), channel, ok)
        with pytest.raises(ContractError, match="a mean of at"):
            check_estimator(PlugIn(), channel, wrong)
    monkeypatch.setattr(PlugIn, "bound", "sideways")
    with pytest.raises(ContractError, match="a bound of"):
        check_estimator(PlugIn(), channel, BITS)


def test_a_contract_error_is_an_assertion_and_ours():
    assert issubclass(ContractError, AssertionError)
    assert issubclass(ContractError, BitquorumError)


def test_checks_leave_their_subject_alone():
    quantizer = Quantizer(2, law=StochasticRounding(), learned=True)
    before = copy.deepcopy(quantizer.state_dict())
    check_quantizer(quantizer, draws=50)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.log_step.grad is None
