"""Test attacks from other models: the copies are what they say, and what is found there is what is tried here."""

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.attacks import APGD, DIVA, FGSM, PGD, Transfer
from bitquorum.attacks.base import Problem
from bitquorum.attacks.transfer import TwinModel, source_of, true_probability
from bitquorum.conversion import Policy, quantizers
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Examples, Ladder
from bitquorum.interface import Cost, InputError
from bitquorum.quantizers import Quantizer, Surrogate
from bitquorum.quantizers.twin import twin
from bitquorum.testing import check_attack

IMAGES, LABELS = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(10) % 3


def quantized() -> Ensemble:
    with rng.torch_seed(1):
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    policies = [Policy(weight_bits=3, activation_bits=2), Policy(weight_bits=2, activation_bits=3)]
    return Ensemble.build([network, network], policies).eval().requires_grad_(False)


def plain(seed: int) -> Ensemble:
    with rng.torch_seed(seed):
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    network[1].bias.data = -0.5 * network[1].weight.data.sum(1)  # grey lies in the middle, where all classes meet
    network[3].bias.data.zero_()
    return Ensemble([network]).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["nearest", "mean", "float"])
def test_a_twin_is_free_of_noise_and_says_what_it_says(kind: str):
    quantizer, x = Quantizer(3), torch.linspace(-0.5, 1.5, 41).view(1, -1)
    levels = quantizer.levels()
    with twin(kind):
        first, second = quantizer(x), quantizer(x)
    expected = {
        "nearest": levels[(x[..., None] - levels).abs().argmin(-1)],
        "mean": quantizer.mean(x),
        "float": x.clamp(float(levels[0]), float(levels[-1])),
    }[kind]
    assert torch.equal(first, second)
    middle = ((x[..., None] - levels).abs().sort(-1).values.diff(dim=-1)[..., 0] > 1e-5) | (kind != "nearest")
    assert torch.allclose(first[middle], expected[middle], atol=1e-6)


@pytest.mark.parametrize("kind", ["nearest", "mean", "float"])
def test_a_twin_model_gives_equal_logits_under_every_draw(kind: str):
    model = quantized()
    copy = TwinModel(model=model, kind=kind)
    with rng.draw([1, 2]):
        logits, noisy = copy(IMAGES), model(IMAGES)
    assert torch.allclose(logits[0], logits[1], atol=1e-6)
    assert not torch.equal(noisy[0], noisy[1])
    leaf = IMAGES.clone().requires_grad_()
    with rng.draw(1):
        (gradient,) = torch.autograd.grad(copy(leaf).square().sum(), leaf)
    assert float(gradient.abs().max()) > 0


def test_transfer_is_the_attack_on_the_source():
    model, inner = quantized(), PGD(steps=5, loss="margin")
    for kind in ("nearest", "mean", "float"):
        copy = TwinModel(model=model, kind=kind)
        seed = rng.derive(7, "transfer")
        known = inner(copy, IMAGES, LABELS, epsilon=0.1, seed=seed)
        found = Transfer(source=kind, attack=inner)(model, IMAGES, LABELS, epsilon=0.1, seed=7)
        assert torch.equal(found.images, known.images)
        assert found.cost == known.cost == Cost(forward=5, backward=5)


def test_transfer_never_asks_the_model_itself():
    class Deaf(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("the model was asked")

    source = plain(2)
    found = Transfer(source="other", attack=FGSM())(Deaf(), IMAGES, LABELS, epsilon=0.1, sources={"other": source})
    known = FGSM()(source, IMAGES, LABELS, epsilon=0.1)
    assert torch.equal(found.images, known.images)


def test_a_copy_of_the_same_network_breaks_what_it_was_copied_from():
    model = plain(2)
    labels = model.predict(model(IMAGES))[0]
    attack = Transfer(source="copy", attack=APGD(steps=20))
    found = attack(model, IMAGES, labels, epsilon=0.3, sources={"copy": plain(2)}).images
    direct = APGD(steps=20)(model, IMAGES, labels, epsilon=0.3).images
    broken, known = (model.predict(model(x))[0] != labels for x in (found, direct))
    assert int(broken.sum()) == int(known.sum()) > 0


@pytest.mark.parametrize("attack", [Transfer(source="mean", attack=PGD(steps=2)), DIVA(steps=2, source="nearest")])
def test_keeps_the_contract(attack):
    check_attack(attack, model=quantized(), images=IMAGES[:6], labels=LABELS[:6])


def test_a_source_that_nobody_holds_is_named():
    for attack in (Transfer(source="gone"), DIVA(source="gone")):
        with pytest.raises(InputError, match="expected a source among nearest, mean, float, here, got 'gone'"):
            attack(plain(1), IMAGES, LABELS, epsilon=0.1, sources={"here": plain(2)})


def test_a_star_stands_for_every_source():
    ladder = Ladder(name="t", claim=PGD(steps=2), rungs=(Transfer(source="*", attack=FGSM()),))
    labels = [rung.label for rung in ladder.rungs_for(plain(1), {"one": plain(2), "two": plain(3)})]
    assert labels == ["PGD-2", "from one: FGSM", "from two: FGSM"]
    assert [rung.label for rung in ladder.rungs_for(plain(1))] == ["PGD-2"]


def test_what_is_done_to_a_source_is_fitted_to_the_source():
    attack = PGD(steps=2, eot=3, pooling="mean-logits")
    ladder = Ladder(name="t", claim=PGD(steps=2), rungs=(Transfer(source="*", attack=attack), Transfer(attack=attack)))
    (_, noisy, quiet) = ladder.rungs_for(plain(1), {"noisy": quantized(), "quiet": plain(2)})
    assert noisy == Transfer(source="noisy", attack=attack)
    assert quiet == Transfer(source="quiet", attack=PGD(steps=2, selection=1))


def test_a_source_with_the_name_of_a_copy_is_refused():
    examples = Examples(images=IMAGES, labels=LABELS, index=torch.arange(10))
    with pytest.raises(InputError, match="expected sources of other names than nearest, mean, float"):
        Ladder(name="t", claim=PGD(steps=2), rungs=())(plain(1), examples, epsilon=0.1, sources={"float": plain(2)})


def test_diva_fools_one_model_and_leaves_the_other_right():
    model, source = plain(2), plain(3)
    images = torch.rand(60, 1, 4, 4)
    labels = source.predict(source(images))[0]
    both = model.predict(model(images))[0] == labels
    images, labels = images[both], labels[both]
    diva = DIVA(source="source", steps=40)(model, images, labels, epsilon=0.3, sources={"source": source}).images
    pgd = PGD(steps=40)(model, images, labels, epsilon=0.3).images

    def evades(x: Tensor) -> float:
        wrong, right = model.predict(model(x))[0] != labels, source.predict(source(x))[0] == labels
        return float((wrong & right).float().mean())

    assert evades(diva) > evades(pgd)
    problem = Problem(model=model, images=images, labels=labels, epsilon=0.3, examples=torch.arange(len(images)))
    before, after = (
        float((true_probability(source(x), labels) - true_probability(model(x), labels)).mean()) for x in (images, diva)
    )
    assert after > before
    assert source_of(problem, "mean").model is model


def test_diva_counts_the_passes_of_both_models():
    cost = DIVA(steps=3, eot=4, source="mean")(quantized(), IMAGES, LABELS, epsilon=0.1).cost
    assert cost == Cost(forward=3 * (4 + 1), backward=3 * (4 + 1))
    cost = DIVA(steps=3, eot=4, source="x")(quantized(), IMAGES, LABELS, epsilon=0.1, sources={"x": plain(1)}).cost
    assert cost == Cost(forward=24, backward=24)


def test_labels_name_source_and_budget():
    assert Transfer(source="nearest", attack=PGD(steps=20, loss="margin")).label == "from nearest: PGD-20 margin"
    assert DIVA(steps=20, eot=5, weight=2.0, surrogate=Surrogate(width=2.0)).label.startswith("DIVA-20x5 against float")


def test_twins_leave_no_quantizer_noisy():
    model = quantized()
    assert len(list(quantizers(model.members[0]))) > 0
    with twin("nearest"), rng.draw([1, 2]):
        assert torch.allclose(*model(IMAGES), atol=1e-6)
