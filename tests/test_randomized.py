"""Test the contract of every conversion, and randomized networks against the variances and means of their formulas."""

import copy
import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from bitquorum import rng, zoo
from bitquorum.attacks import PGD, Transfer
from bitquorum.conversion import Conversion, Policy, calibrate, convert, is_stochastic, quantizers
from bitquorum.data import ImageSet
from bitquorum.dorefa import Dorefa, Pact
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Ladder
from bitquorum.evaluate.ladder import is_quantized
from bitquorum.interface import InputError, NoEffectWarning
from bitquorum.layers import Noise, QuantLayer
from bitquorum.objective import EnsembleCrossEntropy, InputGradient, Objective
from bitquorum.quantizers import Deterministic, Gaussian, Law, Logistic, Quantizer, StochasticRounding, Surrogate
from bitquorum.quantizers.twin import twin
from bitquorum.randomized import (
    ActivationPruning,
    GaussianControl,
    LayerNoise,
    RandomPrecision,
    RandomSwitch,
    RangeNoise,
    WeightNoise,
    mean_variance,
)
from bitquorum.registry import decode, encode, registered
from bitquorum.train import Trainer

DETERMINISTIC = (Dorefa(), Dorefa(first=True, linear=True, last=True), Pact())
ADDITIVE = (GaussianControl(), GaussianControl(activation_bits=None), ActivationPruning(), WeightNoise(), LayerNoise())
RANDOM = (RandomPrecision(bits=(2, 3, 5)), *ADDITIVE)
EVERY = (*DETERMINISTIC, *RANDOM)
TWINS: Any = ("nearest", "mean", "float")
ANY: Any = Conversion


def each(conversions):
    return pytest.mark.parametrize("conversion", conversions, ids=lambda c: f"{type(c).__name__}-{c.label}")


def network(seed=0, norm="batch") -> Any:
    with rng.torch_seed(seed):
        return zoo.DigitsNet(width=4, norm=norm)(classes=3, shape=(1, 8, 8)).double().eval()


def images(count=5):
    return rng.uniform(6, torch.arange(count), 64).view(count, 1, 8, 8).double()


def run(model, x, seeds: Any = 0, examples=None) -> Any:
    with rng.draw(seeds, examples), torch.no_grad():
        return model(x)


def assert_variance(noise, variance):
    """Fail if normal noise has another variance, by more than five standard errors."""
    assert abs(float(noise.mean())) < 5 * (variance / noise.numel()) ** 0.5
    assert abs(float(noise.square().mean()) / variance - 1) < 5 * (2 / noise.numel()) ** 0.5


# Every conversion


def test_every_conversion_is_tested():
    assert {type(conversion) for conversion in EVERY} | {Policy} == set(registered(ANY).values())


@each(EVERY)
def test_a_conversion_is_its_own_table(conversion):
    assert decode(Conversion, encode(conversion)) == conversion


@each(EVERY)
def test_a_conversion_is_a_copy_and_says_whether_it_is_random(conversion):
    float_network = network()
    before = copy.deepcopy(float_network.state_dict())
    converted, x = conversion(float_network), images()
    assert all(torch.equal(value, before[name]) for name, value in float_network.state_dict().items())
    assert {value.dtype for value in converted.state_dict().values() if value.is_floating_point()} == {torch.float64}
    assert run(converted, x).shape == (5, 3)
    assert run(converted, x).isfinite().all()
    assert not any(module.training for module in converted.modules() if isinstance(module, Noise | nn.BatchNorm2d))
    differ = any(not torch.equal(run(converted, x, 0), run(converted, x, seed)) for seed in range(1, 6))
    assert differ == is_stochastic(converted) == (conversion in RANDOM)
    assert not torch.allclose(run(converted, x), float_network(x), atol=1e-3)
    named = [(name, module) for name, module in converted.named_modules() if hasattr(module, "address")]
    assert named
    assert all(module.address == name for name, module in named)


@each(EVERY)
def test_a_conversion_is_a_function_inside_a_draw_whatever_the_batch(conversion):
    ensemble, x, index = Ensemble([conversion(network())]), images(), torch.tensor([8, 3, 1, 7, 2])
    ensemble.eval()
    seeds = [1, 2, 3]
    together = run(ensemble, x, seeds, index)
    for row, seed in enumerate(seeds):
        assert torch.allclose(together[row], run(ensemble, x, seed, index)[0], atol=1e-9)
    parts = [run(ensemble, x[part], seeds, index[part]) for part in (slice(2), slice(2, None))]
    assert torch.allclose(torch.cat(parts, 2), together, atol=1e-9)
    other: Any = Ensemble([conversion(network(1))]).eval()
    other.load_state_dict(ensemble.state_dict())
    for same in (other, pickle.loads(pickle.dumps(ensemble)), copy.deepcopy(ensemble)):
        assert torch.equal(run(same, x, seeds, index), together)
    state = torch.get_rng_state()
    run(ensemble, x)
    assert torch.equal(torch.get_rng_state(), state)


@each(RANDOM)
def test_features_and_logits_belong_together(conversion):
    ensemble, x = Ensemble([conversion(network()), network(1)]).eval(), images()
    outputs = run(ensemble.outputs, x, [1, 2, 3])
    assert [features.shape for features in outputs.features] == [(15, 16), (15, 16)]
    for draw, seed in enumerate([1, 2, 3]):
        alone = run(ensemble.outputs, x, seed)
        assert torch.allclose(alone.features[0], outputs.features[0][5 * draw : 5 * draw + 5], atol=1e-9)
        assert torch.allclose(alone.logits[0], outputs.logits[draw], atol=1e-9)


@each(RANDOM)
def test_a_twin_has_no_noise(conversion):
    converted, x = conversion(network()).eval(), images()
    for kind in TWINS:
        with twin(kind), torch.no_grad():
            fixed = run(converted, x, 1)
            assert torch.equal(run(converted, x, 2), fixed)
            assert torch.equal(converted(x), fixed)
            assert torch.allclose(run(converted, x.repeat(2, 1, 1, 1), [1, 2])[5:], fixed, atol=1e-9)
        if type(conversion) in (ActivationPruning, WeightNoise, LayerNoise):
            assert torch.equal(fixed, network()(x))


@each(EVERY)
def test_gradients_reach_images_and_weights_to_the_second_order(conversion):
    converted, x = conversion(network(norm="none")), images().requires_grad_()
    converted.eval()
    with rng.draw([3, 4]):
        loss = converted(x.repeat(2, 1, 1, 1)).log_softmax(-1)[:, 0].sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        assert gradient.isfinite().all()
        assert gradient.any()
        gradient.abs().sum().backward()
    weights = [parameter for parameter in converted.parameters() if parameter.dim() > 1]
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in weights]
    assert all(reached)
    assert all(parameter.grad.isfinite().all() for parameter in converted.parameters() if parameter.grad is not None)


@each(EVERY)
def test_three_steps_of_training_move_the_weights(conversion):
    data = ImageSet(
        name="toy",
        split="train",
        images=(255 * images(24)).to(torch.uint8),
        labels=torch.arange(24) % 3,
        classes=("a", "b", "c"),
        index=torch.arange(24),
    )
    trainer = Trainer(epochs=1, batch_size=8, calibration=16, precision="float32", ema=0.5)
    ensemble = Ensemble.build([network().float(), network(1).float()], [conversion, None])
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    trained = trainer(ensemble, data, Objective(terms=(EnsembleCrossEntropy(), InputGradient())))
    after = trained.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    moved = [name for name in after if name.endswith("weight") and "conv" in name]
    assert len(moved) >= 6
    assert not any(torch.equal(after[name], before[name]) for name in moved)


@each(RANDOM)
def test_noise_is_not_converted_twice(conversion):
    with pytest.raises(InputError, match="expected a float network"):
        LayerNoise()(conversion(network()))


@pytest.mark.parametrize("conversion", [Dorefa(), LayerNoise(), ActivationPruning()], ids=lambda c: type(c).__name__)
def test_a_network_without_known_parts_is_warned_of(conversion):
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        conversion(nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomPrecision(bits=(4,)), "at least two increasing precisions"),
        (lambda: RandomPrecision(bits=(4, 4)), "at least two increasing precisions"),
        (lambda: RandomPrecision(bits=(4, 9)), r"in \[1, 8\], got \(4, 9\)"),
        (lambda: ActivationPruning(share=0.0), "share above 0, got 0.0"),
        (lambda: WeightNoise(initial=-1.0), "initial strength above 0, got -1.0"),
        (lambda: LayerNoise(image=0.0, inner=0.0), "one of them above 0"),
        (lambda: LayerNoise(inner=math.inf), "finite standard deviations"),
        (lambda: GaussianControl(weight_bits=None, activation_bits=None), "got none of either"),
    ],
)
def test_bad_values_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_labels_say_precision_and_method():
    labels = [conversion.label for conversion in EVERY]
    assert labels[:4] == ["w4a4", "w4a4", "w4a4", "w2+3+5a2+3+5"]
    assert labels[4:] == ["gauss w4a4", "gauss w4a32", "fp sap", "fp pni", "fp rse"]
    assert RandomPrecision().label == "w4-8a4-8"


# Gaussian noise in place of rounding


@pytest.mark.parametrize(
    "law", [Logistic(), Logistic(scale=0.6), Gaussian(), StochasticRounding(), Deterministic()], ids=repr
)
def test_the_mean_variance_is_what_rounding_shows(law: Law):
    if isinstance(law, StochasticRounding):  # f (1 - f), and it is 1/6 in the mean
        assert mean_variance(law) == pytest.approx(1 / 6, rel=1e-5)
    quantize = Quantizer(4, high=15.0, law=law)
    x = 7 + torch.arange(50).double().add(0.5)[:, None].expand(-1, 4000) / 50
    found = run(quantize, x, 3).view(50, 40, 100).var(2).mean(0)  # of 100 draws, averaged over 50 places of a step
    assert abs(float(found.mean()) - mean_variance(law)) <= 5 * float(found.std()) / 40**0.5


def test_range_noise_clips_and_adds_the_variance_of_rounding():
    quantizer = Quantizer(3, grid="two-sided", low=-1.0, high=2.5, learned=True).double()
    noise, step = RangeNoise(quantizer), 0.5
    x = torch.tensor([-3.0, -1.0, 0.3, 2.5, 9.0], dtype=torch.float64).expand(20_000, 5)
    drawn = run(noise, x, 2)
    assert_variance(drawn - x.clamp(-1, 2.5), mean_variance(Logistic()) * step**2)
    with twin("nearest"):
        assert torch.allclose(noise(x), x.clamp(-1, 2.5), atol=1e-6)


def test_range_noise_learns_its_range_as_a_quantizer_does():
    quantizer = Quantizer(3, high=1.0, law=Deterministic(), learned=True)
    noise = RangeNoise(copy.deepcopy(quantizer))
    x = torch.linspace(-0.5, 2, 101)
    (rounded,) = torch.autograd.grad(quantizer(x)[x > 1].sum(), quantizer.log_step)
    (clipped,) = torch.autograd.grad(noise(x)[x > 1].sum(), noise.range.log_step)
    assert rounded > 0
    assert torch.allclose(rounded, clipped)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(noise(leaf).sum(), leaf)
    assert torch.equal(slope, ((x >= 0) & (x <= 1)).float())


def test_the_control_replaces_every_quantizer_and_keeps_its_range():
    control: Any = GaussianControl(weight_bits=3, activation_bits=2)(network())
    sq: Any = convert(network(), Policy(weight_bits=3, activation_bits=2))
    for model in (control, sq):
        calibrate(model, images(16))
    ranges = {name.replace(".range", ""): q.log_step for name, q in quantizers(control)}
    assert list(ranges) == [name for name, _ in quantizers(sq)]
    assert torch.equal(ranges["conv1.quantizer"], sq.conv1.quantizer.log_step)
    weight, step = control.conv2.layer.weight, sq.conv2.quantizer.log_step.exp()[:, None, None, None]
    seeds = list(range(200))
    with rng.draw(seeds):
        drawn = torch.stack(control.conv2._weights()).detach()
    scaled = (drawn - weight.detach().clamp(-3.5 * step, 3.5 * step)) / step
    assert_variance(scaled.detach(), mean_variance(Logistic()))


# Random precision


def switched(bits=(2, 4, 8), **options) -> Any:
    return RandomPrecision(bits=bits, **options)(network()).eval()


def test_every_seed_runs_the_network_of_one_precision_and_all_are_equally_likely():
    switch, x = switched(), images()
    for seed in range(8):
        assert torch.equal(run(switch, x, seed), run(switch.alternatives[switch.choice(seed)], x))
    count = Counter(switch.choice(seed) for seed in range(3000))
    assert all(abs(count[place] - 1000) < 5 * (3000 * 2 / 9) ** 0.5 for place in range(3))
    assert len({tuple(map(float, switch(x).detach()[0])) for _ in range(40)}) == 3  # a fresh seed for each call
    with twin("nearest"):
        assert torch.equal(run(switch, x), run(switch.alternatives[2], x))


def test_two_switches_choose_apart():
    pair: Any = Ensemble([switched(), switched()]).members
    same = sum(pair[0].choice(seed) == pair[1].choice(seed) for seed in range(3000))
    assert abs(same - 1000) < 5 * (3000 * 2 / 9) ** 0.5


def test_weights_are_shared_and_norms_and_ranges_are_not():
    first, second, third = switched().alternatives
    assert first.conv2.layer.weight is second.conv2.layer.weight is third.conv2.layer.weight
    assert first.conv1.weight is third.conv1.weight
    assert first.classifier.bias is third.classifier.bias
    assert first.norm1.weight is not third.norm1.weight
    assert first.norm1.running_mean is not third.norm1.running_mean
    assert first.activation1.quantizer.log_step is not third.activation1.quantizer.log_step
    assert [alternative.conv2.quantizer.bits for alternative in (first, second, third)] == [2, 4, 8]
    quantized = {name for name, module in first.named_modules() if isinstance(module, QuantLayer)}
    assert quantized == {"conv2", "conv3"}
    ends = switched(ends=True).alternatives[0]
    assert {name for name, module in ends.named_modules() if isinstance(module, QuantLayer)} == {
        "conv1",
        "conv2",
        "conv3",
        "classifier",
    }


def test_calibration_reaches_every_precision():
    switch = switched()
    calibrate(switch, images(16))
    for bits, alternative in zip((2, 4, 8), switch.alternatives, strict=True):
        alone: Any = RandomPrecision(bits=(1, bits))(network()).alternatives[1]
        calibrate(alone, images(16))
        for name in ("activation1", "activation3"):
            assert torch.equal(
                alternative.get_submodule(name).quantizer.log_step, alone.get_submodule(name).quantizer.log_step
            )


def test_noise_inside_the_alternatives_is_that_of_each_seed():
    switch: Any = RandomSwitch([Policy()(network()), LayerNoise()(network())])
    ensemble, x, index = Ensemble([switch]).eval(), images(), torch.tensor([8, 3, 1, 7, 2])
    together = run(ensemble, x, [1, 2, 3, 4], index)
    assert {switch.choice(seed) for seed in (1, 2, 3, 4)} == {0, 1}
    for row, seed in enumerate([1, 2, 3, 4]):
        assert torch.allclose(together[row], run(ensemble, x, seed, index)[0], atol=1e-9)


def test_a_batch_that_does_not_fit_the_seeds_is_refused():
    with pytest.raises(InputError, match="a batch of 2 copies of the examples"):
        run(RandomSwitch([nn.Linear(2, 2)]), torch.rand(3, 2), [1, 2])


# Pruning


def test_pruning_keeps_the_mean_and_the_stated_share():
    pruned: Any = ActivationPruning(share=0.5)(nn.Sequential(nn.ReLU())).eval()
    row = torch.tensor([0.0, 0.1, 0.4, 1.0, 2.5, -3.0], dtype=torch.float64)
    x = row.expand(20_000, 6)
    drawn = run(pruned, x, 4)
    p = row.clamp(min=0) / 4.0
    kept = 1 - (1 - p) ** 3  # half of six units: three draws
    found = (drawn != 0).double().mean(0)
    assert (abs(found - kept) <= 5 * (kept * (1 - kept) / len(x)).sqrt() + 1e-12).all()
    spread = row.clamp(min=0) * ((1 - kept) / kept.clamp(min=1e-9) / len(x)).sqrt()
    assert (abs(drawn.mean(0) - row.clamp(min=0)) <= 5 * spread + 1e-12).all()
    assert torch.equal(run(pruned, torch.zeros(2, 6)), torch.zeros(2, 6))


def test_the_gradient_of_pruning_is_the_factor_of_what_is_kept():
    pruned: Any = ActivationPruning()(nn.Sequential(nn.ReLU())).eval()
    x = (torch.rand(40, 30, dtype=torch.float64) + 0.1).requires_grad_()
    with rng.draw(1):
        y = pruned(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (y == 0).any()
    assert torch.allclose(gradient, y / x)


def test_pruning_waits_for_evaluation():
    pruned, x = ActivationPruning()(network()), images()
    pruned.train()
    assert torch.equal(run(pruned, x), network().train()(x))
    pruned.eval()
    assert not torch.allclose(run(pruned, x), network()(x))


# Additive noise


def test_weight_noise_has_alpha_times_the_deviation_of_the_weights():
    layer = nn.Linear(60, 40).double()
    noisy: Any = WeightNoise(initial=0.3)(layer)
    with rng.draw(list(range(30))):
        drawn = torch.stack(noisy._weights()).detach()
    variance = 0.09 * float(layer.weight.detach().var())
    assert_variance(drawn - layer.weight.detach(), variance)
    flat = (drawn - layer.weight.detach()).flatten(1)
    assert abs(float(torch.corrcoef(flat[:2])[0, 1])) < 5 / 2400**0.5
    x = torch.rand(4, 60, dtype=torch.float64)
    expected = x @ drawn[7].T + layer.bias
    assert torch.allclose(run(noisy, x, 7), expected.detach())


def test_alpha_learns_from_the_noise_alone():
    noisy: Any = WeightNoise()(nn.Linear(6, 5).double())
    weight = noisy.layer.weight
    u = rng.uniform(1, torch.arange(5), 6).double()
    found = torch.autograd.grad(noisy.quantizer(weight, noise=u).sum(), [noisy.quantizer.alpha, weight])
    normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
    assert float(found[0]) == pytest.approx(float(weight.detach().std() * normal.sum()), rel=1e-6)
    assert torch.equal(found[1], torch.ones_like(weight))


def test_layer_noise_comes_before_each_convolution():
    model: Any = LayerNoise(image=0.2, inner=0.1)(nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.Conv1d(2, 1, 1)))
    x = torch.rand(100, 2, 50)
    for place, deviation in ((0, 0.2), (2, 0.1)):
        part = x[:, :1] if place == 0 else x
        assert_variance(run(model[place][0], part, 5) - part, deviation**2)
    first, second = run(model[0][0], x), run(model[2][0], x)
    assert abs(float(torch.corrcoef(torch.stack([first - x, second - x]).flatten(1))[0, 1])) < 5 / 1e4**0.5
    assert isinstance(model[0][1], nn.Conv1d)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_noise_in_half_precision_is_that_of_single_precision(kind):
    x, layer = torch.full((200, 500), 0.5), nn.Linear(500, 200)
    added: Any = LayerNoise()(nn.Sequential(nn.Conv1d(500, 1, 1)))[0][0]
    half = run(added, x.to(kind))
    assert half.dtype == kind
    assert torch.equal(half, run(added, x).to(kind))
    noisy: Any = WeightNoise()(layer.to(kind))
    with rng.draw(1):
        (weight,) = noisy._weights()
    assert weight.dtype == kind
    assert weight.isfinite().all()


# Rungs of a ladder


@pytest.mark.parametrize(
    ("conversion", "sources"),
    [(None, []), (WeightNoise(), ["mean"]), (GaussianControl(), ["mean"]), (RandomPrecision(bits=(2, 3)), list(TWINS))],
    ids=["float", "weights", "control", "precision"],
)
def test_a_ladder_climbs_the_copies_without_noise_that_differ(conversion, sources):
    rungs = (*(Transfer(source=source) for source in TWINS), PGD(steps=2, surrogate=Surrogate(width=2.0)))
    model = Ensemble.build([network()], [conversion])
    found = Ladder(name="test", claim=PGD(steps=2), rungs=rungs).rungs_for(model)
    assert [rung.source for rung in found if isinstance(rung, Transfer)] == sources
    assert is_quantized(model) == (len(sources) == 3)
    assert sum(isinstance(rung, PGD) for rung in found) == (2 if len(sources) == 3 else 1)
