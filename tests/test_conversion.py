"""Convert networks there and back, quantize layers, and calibrate."""

import copy
import inspect
import pickle
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from bitquorum import rng, zoo
from bitquorum.conversion import (
    ACTIVATIONS,
    Override,
    Policy,
    calibrate,
    convert,
    is_stochastic,
    quantizers,
    restore,
)
from bitquorum.dorefa import Dorefa
from bitquorum.ensemble import Ensemble
from bitquorum.interface import InputError, NoEffectWarning, SharedNoiseWarning
from bitquorum.layers import QuantActivation, QuantImage, QuantLayer
from bitquorum.quantizers import Deterministic, Logistic, Quantizer, StochasticRounding, Surrogate
from bitquorum.randomized import RandomSwitch

FIXED = Policy(weight_law=Deterministic(), activation_law=Deterministic(), learned=False)
NETWORKS = {
    "linear": (zoo.Linear(), 8),
    "digits": (zoo.DigitsNet(width=4), 8),
    "digits-softplus": (zoo.DigitsNet(width=4, norm="none", activation="softplus"), 8),
    "cifarconv": (zoo.CIFARconv(width=4), 15),
    "mnistconv": (zoo.MNISTconv(width=4), 28),
    "small": (zoo.SmallResNet(widths=(4, 6, 8)), 8),
    "resnet-cifar": (zoo.ResNetCifar(depth=8, width=4), 8),
    "resnet18": (zoo.ResNet18(width=4, norm="group"), 8),
    "preact18": (zoo.PreActResNet18(width=4), 8),
    "wide": (zoo.WideResNet(depth=10, width=1, activation="silu"), 8),
}


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), activation(), nn.Linear(8, 3))


def images(count=4, size=8, channels=1):
    return rng.uniform(5, torch.arange(count), channels * size * size).view(count, channels, size, size)


def run(network, x, seeds: Any = 0, examples=None) -> Any:
    with rng.draw(seeds, examples), torch.no_grad():
        return network(x)


def types(network):
    return Counter(type(module) for module in network.modules())


def assert_same_state(first, second):
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


class Residual(nn.Module):
    """Hold odd things: a shared activation, a shared container, a list, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU()
        self.block = nn.Sequential(nn.Linear(6, 6), self.activation)
        self.again = self.block
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Sequential(nn.Sequential(nn.Linear(6, 3)))])

    def forward(self, x):
        x = self.again(self.block(x))
        return self.heads[0](x) + self.heads[1](self.activation(x))


# There and back


@pytest.mark.parametrize(("builder", "size"), NETWORKS.values(), ids=NETWORKS)
def test_round_trip_of_the_zoo(builder, size):
    network = builder(classes=10, shape=(1, size, size)).eval()
    before = copy.deepcopy(network)
    quantized: Any = convert(network, Policy(weight_bits=3, activation_bits=2, image_bits=4))
    assert_same_state(network, before)
    x = images(3, size)
    assert run(quantized, x).shape == (3, 10)
    assert run(quantized, x).isfinite().all()
    assert not torch.equal(run(quantized, x, 1), run(quantized, x, 2))
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    activated = [m for m in network.modules() if type(m) in ACTIVATIONS]
    found = types(quantized)
    assert (found[QuantLayer], found[QuantActivation], found[QuantImage]) == (len(weighted), len(activated), 1)
    back: Any = restore(quantized)
    assert types(back) == types(network)
    assert_same_state(back, network)
    assert torch.equal(back(x), network(x))


@pytest.mark.parametrize(("builder", "size"), list(NETWORKS.values())[1:3], ids=list(NETWORKS)[1:3])
def test_fine_rounding_approaches_the_float_network(builder, size):
    network = builder(classes=10, shape=(1, size, size)).eval()
    quantized: Any = convert(network, Policy(weight_bits=8, activation_bits=8, **laws(Deterministic())))
    x = images(16, size)
    calibrate(network.train(), x)  # nothing to set, nothing to change
    calibrate(quantized, x)
    network.train()
    float_logits = copy.deepcopy(network)(x)
    quantized.train()
    error = (quantized(x) - float_logits).detach()
    assert error.std() < 0.05 * float_logits.std()


def laws(law) -> Any:
    return {"weight_law": law, "activation_law": law}


def test_odd_modules_keep_their_structure():
    network = Residual()
    quantized: Any = convert(network, Policy())
    assert quantized.block is quantized.again
    assert quantized.block[1] is quantized.activation
    assert isinstance(quantized.activation, QuantActivation)
    assert isinstance(quantized.heads[1][0][0], QuantLayer)
    assert len(list(quantizers(quantized))) == 4
    assert run(quantized, torch.rand(5, 6)).shape == (5, 3)
    back: Any = restore(quantized)
    assert back.block is back.again
    assert back.block[1] is back.activation
    assert_same_state(back, network)


def test_a_network_may_be_a_single_layer():
    for module, kind in ((nn.Linear(4, 2), QuantLayer), (nn.ReLU(), QuantActivation)):
        quantized: Any = convert(module, Policy(overrides=(Override(pattern="*", weight_bits=2, activation_bits=2),)))
        assert isinstance(quantized, kind)
        assert quantized.quantizer.bits == 2
        assert quantized.quantizer.address == "quantizer"
        assert run(quantized, torch.rand(3, 4)).shape[0] == 3
        assert type(restore(quantized)) is type(module)


def test_every_known_activation_is_quantized_near_itself():
    x = torch.linspace(-6, 6, 2001)[:, None]
    for kind in ACTIVATIONS:
        quantized: Any = convert(nn.Sequential(kind()), Policy(activation_bits=8, **laws(Deterministic())))
        calibrate(quantized, x)
        step = quantized[0].quantizer.levels().diff().max()
        exact = kind()(x)
        assert (quantized(x) - exact).abs().mean() < 0.6 * step, kind


def test_subclasses_of_known_layers_are_left_alone():
    class Mine(nn.Linear):
        pass

    with pytest.warns(NoEffectWarning, match="changed nothing"):
        convert(nn.Sequential(Mine(2, 2)), Policy())


def test_weights_that_stay_in_float_are_named_unless_an_override_leaves_them_so():
    class Mine(nn.Conv2d):
        pass

    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm((4, 6, 6)), Mine(4, 4, 3), nn.ConvTranspose2d(4, 2, 3))
    with pytest.warns(NoEffectWarning, match=r"weights in float: 2, 3; types"):
        convert(network, Policy())
    with pytest.warns(NoEffectWarning, match=r"weights in float: 3; types"):
        convert(network, Policy(overrides=(Override(pattern="2"),)))
    convert(network, Policy(overrides=(Override(pattern="[23]"),)))
    convert(network, Policy(weight_bits=None, activation_bits=None, image_bits=4))
    normed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.warns(NoEffectWarning, match=r"weights in float: 2; types"):
        convert(normed, Policy())


def test_activations_that_are_functions_are_warned_of():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(F.relu(self.first(x)))

    with pytest.warns(NoEffectWarning, match="no activation of the 2 layers"):
        convert(Net(), Policy())
    convert(Net(), Policy(activation_bits=None))
    convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), Policy(overrides=(Override(pattern="1"),)))


@pytest.mark.parametrize("weight_bits", [4, None])
def test_a_transformer_passes_its_quantizers_in_evaluation_without_gradients_too(weight_bits):
    """Torch's fast path there reads the weights of layers by name and takes no step through an activation's module."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=nn.GELU(), batch_first=True)
    network = nn.TransformerEncoder(layer, 2).eval()
    attention = Override(pattern="*self_attn*")
    quantized = convert(network, Policy(weight_bits=weight_bits, activation_bits=2, overrides=(attention,)))
    x = rng.uniform(5, torch.arange(3), 4 * 8).view(3, 4, 8)
    with rng.draw(0):
        attacked = quantized(x.requires_grad_()).detach()
    torch.testing.assert_close(run(quantized, x), attacked)
    assert (attacked - run(network, x)).abs().max() > 0.05


@pytest.mark.parametrize("change", [nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)])
def test_a_weight_that_a_hook_makes_is_refused(change):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    change(network[2])
    network(torch.rand(3, 4)).sum().backward()
    for conversion in (Policy(), Dorefa(last=True, linear=True)):
        with pytest.raises(InputError, match=r"^2: expected a layer whose weight is a parameter"):
            conversion(network)
    if prune.is_pruned(network[2]):
        prune.remove(network[2], "weight")
        assert isinstance(convert(network, Policy())[2], QuantLayer)


@pytest.mark.parametrize("place", [0, 1])
def test_hooks_that_nothing_would_call_are_refused(place):
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    handle = network[place].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=f"^{place}: expected no hooks on a module that the conversion replaces"):
        convert(network, Policy())
    handle.remove()
    network.register_forward_hook(lambda *_: None)  # of what stays
    assert isinstance(convert(network, Policy())[0], QuantLayer)


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_that_no_quantizer_has_are_refused_at_once(bits):
    for name in ("weight_bits", "activation_bits", "image_bits"):
        with pytest.raises(InputError, match=r"integer in \[1, 8\]"):
            Policy(**{name: bits})
    with pytest.raises(InputError, match=r"integer in \[1, 8\]"):
        Override(pattern="first", weight_bits=bits)


def test_scripts_and_lazy_weights_are_refused():
    with pytest.raises(InputError, match="expected weights of a known shape, got lazy ones; call the network"):
        convert(nn.Sequential(nn.LazyLinear(3), nn.ReLU()), Policy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has deprecated them, and people have them
        script = torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    with pytest.raises(InputError, match="got one that is compiled to TorchScript"):
        convert(nn.Sequential(nn.Flatten(), script), Policy())


def test_weights_of_zero_are_warned_of():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.zeros_(network[2].weight)
    with pytest.warns(NoEffectWarning, match="^2: the weights are all zero, so that training cannot move them"):
        convert(network, Policy())
    convert(network, Policy(overrides=(Override(pattern="last", weight_bits=None),)))


def test_every_member_of_an_ensemble_is_restored():
    network = mlp()
    ensemble = Ensemble.build([network, network], [Policy(image_bits=4), Policy(weight_bits=2)])
    back: Any = restore(ensemble)
    assert not list(quantizers(back))
    for member in back.members:
        assert types(member) == types(network)
        assert_same_state(member, network)


def test_a_policy_without_bits_has_no_effect():
    with pytest.warns(NoEffectWarning, match="changed nothing"):
        quantized: Any = convert(mlp(), Policy(weight_bits=None, activation_bits=None))
    assert not is_stochastic(quantized)


def test_a_quantized_network_is_refused():
    quantized = Policy()(mlp())
    with pytest.raises(InputError, match="quantized already; use `restore` first"):
        convert(quantized, Policy())
    assert types(convert(restore(quantized), Policy())) == types(quantized)


def test_state_round_trips_through_a_file(tmp_path):
    quantized: Any = convert(zoo.DigitsNet(width=4)(classes=10, shape=(1, 8, 8)), Policy(image_bits=3))
    calibrate(quantized, images(8))
    torch.save(quantized.state_dict(), tmp_path / "state.pt")
    other = convert(zoo.DigitsNet(width=4)(classes=10, shape=(1, 8, 8)), Policy(image_bits=3))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = images()
    for twin in (other, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(run(twin.eval(), x, 3), run(quantized.eval(), x, 3))


def test_quantizers_follow_the_type_of_the_network():
    quantized: Any = convert(mlp().double(), Policy(image_bits=2))
    assert {tensor.dtype for tensor in quantized.state_dict().values()} == {torch.float64}
    assert run(quantized, torch.rand(2, 12, dtype=torch.float64)).dtype == torch.float64
    half = convert(mlp().half(), Policy())
    assert {quantizer.log_step.dtype for _, quantizer in quantizers(half)} == {torch.float32}


# Policies


def test_bits_and_laws_reach_their_parts():
    policy = Policy(
        weight_bits=2,
        activation_bits=3,
        image_bits=5,
        weight_law=Deterministic(),
        activation_law=StochasticRounding(),
        image_law=Logistic(scale=0.3),
        learned=False,
        per_channel=False,
    )
    quantized: Any = convert(mlp(), policy)
    found = {name: (quantizer.bits, quantizer.law) for name, quantizer in quantizers(quantized)}
    assert found == {
        "quantizer": (5, Logistic(scale=0.3)),
        "network.1.quantizer": (2, Deterministic()),
        "network.2.quantizer": (3, StochasticRounding()),
        "network.3.quantizer": (2, Deterministic()),
    }
    assert not any(isinstance(p, nn.Parameter) and "quantizer" in name for name, p in quantized.named_parameters())
    assert all(quantizer.log_step.dim() == 0 for _, quantizer in quantizers(quantized))
    assert all(quantizer.address == name for name, quantizer in quantizers(quantized))


def test_overrides_choose_bits_by_place_and_name_and_the_last_wins():
    network = zoo.SmallResNet(widths=(4, 4, 4))(classes=10, shape=(1, 8, 8))
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    overrides = (
        Override(pattern="stage1.*", weight_bits=2, activation_bits=2),
        Override(pattern="first", weight_bits=8),
        Override(pattern="last", weight_bits=None),
        Override(pattern="stage1.0.conv2", weight_bits=1),
        Override(pattern="activation", activation_bits=None),
    )
    found = dict(quantizers(convert(network, Policy(weight_bits=4, activation_bits=3, overrides=overrides))))
    bits = {name.removesuffix(".quantizer"): quantizer.bits for name, quantizer in found.items()}
    assert bits[names[0]] == 8
    assert names[-1] not in bits
    assert bits["stage1.0.conv1"] == 2
    assert bits["stage1.0.conv2"] == 1
    assert bits["stage1.0.activation1"] == 2
    assert bits["stage2.0.conv1"] == 4
    assert bits["stage2.0.activation1"] == 3
    assert "activation" not in bits


@pytest.mark.parametrize("pattern", ["stage9.*", "conv", "First"])
def test_an_override_that_matches_nothing_is_refused(pattern):
    with pytest.raises(InputError, match=f"no match for '{pattern}'".replace("*", r"\*")):
        convert(mlp(), Policy(overrides=(Override(pattern=pattern, weight_bits=2),)))


def test_bad_bits_are_refused():
    with pytest.raises(InputError, match=r"integer in \[1, 8\], got 9"):
        convert(mlp(), Policy(weight_bits=9))


# Layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (6,)),
        (nn.Conv1d(3, 4, 3, padding=1), (3, 7)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), (3, 6, 6)),
        (nn.Conv2d(4, 4, 3, groups=2, dilation=2, bias=False), (4, 7, 7)),
        (nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
    ],
    ids=["linear", "conv1d", "circular", "groups", "conv3d"],
)
@pytest.mark.parametrize("law", [Deterministic(), Logistic()], ids=["deterministic", "logistic"])
def test_a_layer_uses_the_quantized_weight(layer, shape, law):
    quantized: Any = convert(layer, Policy(weight_law=law))
    x = torch.rand(3, *shape)
    reference = copy.deepcopy(layer)
    with torch.no_grad(), rng.draw(4):
        noise = rng.uniform_per_draw(layer.weight, "quantizer")[0] if law.stochastic else None
        reference.weight.copy_(quantized.quantizer(layer.weight, noise=noise))
        levels = quantized.quantizer.levels()
        flat = reference.weight.flatten(1)
        assert (flat[..., None] == levels[:, None]).any(-1).all()
        assert torch.equal(run(quantized, x, 4), reference(x))


def test_each_seed_of_a_batch_has_weights_of_its_own():
    quantized: Any = convert(nn.Linear(6, 4).double(), Policy(weight_bits=2))
    x = torch.rand(5, 6, dtype=torch.float64)
    seeds = [3, 8, 3]
    both = run(quantized, x.repeat(3, 1), seeds).chunk(3)
    for seed, part in zip(seeds, both, strict=True):
        assert torch.allclose(part, run(quantized, x, seed), atol=1e-12)
    assert torch.equal(both[0], both[2])
    assert not torch.allclose(both[0], both[1])
    with pytest.raises(InputError, match="a batch of 3 copies of the examples"):
        run(quantized, x, seeds)


@pytest.mark.parametrize("backward", ["mean", "straight-through", "gumbel"])
def test_gradients_reach_weights_and_images_under_every_surrogate(backward):
    quantized: Any = convert(mlp(), Policy())
    x = torch.rand(6, 12, requires_grad=True)
    with rng.draw([1, 2], torch.tensor([7, 3, 5])), Surrogate(backward=backward)():
        logits = quantized(x)
        found = torch.autograd.grad(logits.square().sum(), [x, *quantized.parameters()])
        again = torch.autograd.grad(quantized(x).square().sum(), [x, *quantized.parameters()])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(logits.detach(), run(quantized, x, [1, 2], torch.tensor([7, 3, 5])))


def test_an_absorbed_relu_is_clipped_by_the_range_and_smooth_at_zero():
    quantized: Any = convert(nn.ReLU(), Policy(activation_bits=2))
    x = torch.zeros(4, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(run_with_gradient(quantized, x).sum(), x)
    assert 0 < float(gradient.min()) < 1
    assert float(run(quantized, torch.full((50, 50), -0.1)).max()) > 0  # noise comes before the clip


def run_with_gradient(network, x):
    with rng.draw(0):
        return network(x)


def test_an_activation_that_is_no_clip_comes_first():
    quantized: Any = convert(nn.GELU(), Policy(activation_bits=8, activation_law=Deterministic()))
    x = torch.linspace(-2, 2, 100)[:, None]
    assert torch.equal(quantized(x), quantized.quantizer(F.gelu(x)))


def test_layers_draw_independently_and_examples_keep_their_noise():
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    quantized: Any = convert(network, Policy(activation_bits=8, activation_law=StochasticRounding()))
    x = torch.full((200, 50), 1.5 / 255 + 1.0)
    with rng.draw(1), torch.no_grad():
        first, second = (module.quantizer(x) for module in quantized)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 5 / 100
    order = torch.randperm(200)
    assert torch.equal(run(quantized, x, 1)[order], run(quantized, x[order], 1, order))


def test_a_network_is_a_function_inside_a_draw_whatever_the_batch():
    network = zoo.DigitsNet(width=4)(classes=10, shape=(1, 8, 8)).double().eval()
    quantized: Any = convert(network, Policy(image_bits=4))
    x, index = images(6).double(), torch.tensor([9, 4, 7, 1, 0, 3])
    whole = run(quantized, x, [5, 6][:1], index)
    parts = [run(quantized, x[part], 5, index[part]) for part in (slice(2), slice(2, None))]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-9)
    both = run(quantized, x.repeat(2, 1, 1, 1), [5, 6], index)
    assert torch.allclose(both[:6], whole, atol=1e-9)
    assert not torch.allclose(both[6:], whole)


# Calibration


def test_calibration_leaves_statistics_modes_and_weights_alone():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.9),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
    )
    quantized: Any = convert(network, FIXED)
    quantized.train()
    quantized[1].eval()
    modes = [module.training for module in quantized.modules()]
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    state = torch.get_rng_state()
    calibrate(quantized, 5 * images(16) + 3)
    assert [module.training for module in quantized.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)  # no dropout
    changed = {name for name, value in quantized.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"2.quantizer.log_step", "2.quantizer.fixed_step"} | {
        f"6.quantizer.{name}" for name in ("log_step", "fixed_step", "low")
    }
    assert not any(module._forward_pre_hooks for module in quantized.modules())


def test_bytes_are_no_images_to_calibrate_by():
    quantized = convert(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU()), FIXED)
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    plain = inspect.unwrap(calibrate)  # the run-time check of shapes would come first
    with pytest.raises(InputError, match=r"expected float images in \[0, 1\], got torch.uint8; divide by 255"):
        plain(quantized, torch.full((2, 1, 2, 2), 255, dtype=torch.uint8))
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


def test_calibrated_ranges_fit_what_reaches_them():
    network = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 30), nn.SiLU(), nn.Linear(30, 20), nn.Tanh())
    quantized: Any = convert(network, Policy(weight_bits=8, activation_bits=4, **laws(Deterministic())))
    x = 7 * torch.randn(500, 5)
    calibrate(quantized, x)
    with torch.no_grad():
        hidden = quantized[0](x)
        top = quantized[1].quantizer.levels()[-1]
        assert 0.3 * hidden.max() < top <= 1.001 * hidden.max()
        smooth = F.silu(quantized[2](quantized[1](hidden)))
        levels = quantized[3].quantizer.levels()
        assert float(levels[0]) == pytest.approx(float(smooth.min()), rel=1e-4)
        assert 0.3 * smooth.max() < levels[-1] <= 1.001 * smooth.max()
        error = (quantized[3].quantizer(smooth) - smooth).square().mean()
        assert error < levels.diff()[0].square() / 6  # rounding alone: a twelfth
    assert quantized[5].quantizer.levels()[[0, -1]].tolist() == pytest.approx([-1, 1])  # a known range stays


def test_an_activation_that_serves_several_places_is_named():
    relu = nn.ReLU()
    shared = convert(nn.Sequential(nn.Linear(5, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4), nn.Tanh()), Policy())
    with pytest.warns(SharedNoiseWarning, match=r"several times in a pass: 1; each has one range and one noise"):
        calibrate(shared, torch.randn(20, 5))
    apart = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    calibrate(RandomSwitch([convert(apart, Policy())] * 2), torch.randn(20, 5))


def test_calibration_meets_an_activation_in_place_once():
    """Each layer's input is activated by the calibration, to see its range, and then by the layer."""
    ranges = []
    for inplace in (False, True):
        with rng.torch_seed(0):
            network = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(8, 8), nn.Hardswish(inplace))))
        quantized: Any = convert(network, FIXED)
        calibrate(quantized, 9 * rng.uniform(0, torch.arange(50), 8))
        ranges.append([float(quantized[place].quantizer.levels()[-1]) for place in (1, 3, 5, 7)])
    assert ranges[0] == ranges[1]


def test_calibration_mends_its_hooks_after_a_failure():
    quantized: Any = convert(mlp(), Policy())
    with pytest.raises(InputError, match="finite values to fit a range"):
        calibrate(quantized, torch.full((2, 12), torch.nan))
    assert not any(module._forward_pre_hooks for module in quantized.modules())
    assert quantized.training


def test_quantizers_are_found_by_name():
    quantized: Any = convert(mlp(), Policy(activation_bits=None, weight_law=Deterministic()))
    assert [name for name, _ in quantizers(quantized)] == ["1.quantizer", "3.quantizer"]
    assert all(isinstance(quantizer, Quantizer) for _, quantizer in quantizers(quantized))
    assert not is_stochastic(quantized)
    assert is_stochastic(convert(mlp(), Policy()))
