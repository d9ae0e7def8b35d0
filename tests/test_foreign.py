"""Test that anybody's classifier is understood for what it is, adapted to, or refused with a reason."""

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitquorum import rng
from bitquorum.conversion import Policy, convert
from bitquorum.ensemble import Ensemble
from bitquorum.foreign import Normalized, Wrapped, output_of, wrap
from bitquorum.interface import InputError

IMAGES = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def network(classes: int = 3) -> nn.Sequential:
    with rng.torch_seed(1):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


class Around(nn.Module):
    """Call a function with a network and the images."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.function, self.network = function, network()

    def forward(self, x: Tensor) -> object:
        return self.function(self.network, x)


def votes(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([F.one_hot(net(k * x).argmax(-1), 3).float() for k in (0.5, 1, 2)]).sum(0)


def numpy_noise(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.1 * torch.from_numpy(np.random.standard_normal(x.shape)).float())


def unseeded_noise(net: nn.Module, x: Tensor) -> Tensor:
    generator = torch.Generator()
    generator.seed()
    return net(x + 0.1 * torch.randn(x.shape, generator=generator))


@pytest.mark.parametrize(
    ("function", "stochastic", "scale", "findings"),
    [
        (lambda net, x: net(x), False, "logits", []),
        (lambda net, x: 1e6 * net(x), False, "logits", []),
        (lambda net, x: net(x).softmax(-1), False, "probabilities", ["probabilities"]),
        (lambda net, x: net(x + 0.1 * torch.randn_like(x)), True, "logits", ["random"]),
        (lambda net, x: F.dropout(net(x), 0.5), True, "logits", ["random"]),
        (lambda net, x: net(x + 0.1 * random.random()), True, "logits", ["random"]),
        (numpy_noise, True, "logits", ["random"]),
        (unseeded_noise, True, "logits", ["random", "unseeded"]),
        (lambda net, x: net((x * 3).round() / 3), False, "logits", ["zero-gradient"]),
        (lambda net, x: net(x.detach()), False, "logits", ["zero-gradient"]),
        (votes, False, "votes", ["votes", "zero-gradient"]),
        (lambda net, x: votes(net, x) / 3, False, "votes", ["votes", "zero-gradient"]),
        (lambda net, x: SimpleNamespace(logits=net(x)), False, "logits", []),
        (lambda net, x: {"logits": net(x)}, False, "logits", []),
        (lambda net, x: (net(x), x), False, "logits", []),
    ],
)
def test_what_a_model_is_is_found_by_asking_it(
    function: Callable[[nn.Module, Tensor], object], stochastic: bool, scale: str, findings: list[str]
):
    module = Around(function).eval()
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    model = wrap(module, IMAGES, torch.zeros(20, dtype=torch.int64))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert isinstance(model, Wrapped)
    assert model.module is module
    assert (model.stochastic, model.scale) == (stochastic, scale)
    assert [finding.name for finding in model.findings] == findings
    logits = model(IMAGES)
    assert logits.shape == (1, 1, 20, 3)
    assert model.features(IMAGES).shape[:2] == (1, 20)
    if "unseeded" not in findings:
        with rng.draw([1, 2, 1]):
            draws = model(IMAGES)
        assert torch.equal(draws[0], draws[2])
        assert torch.equal(draws[0], draws[1]) != stochastic
    assert np.array_equal(np.random.get_state()[1], state[1])
    if not stochastic:
        assert torch.equal(model.predict(logits)[0], output_of(module(IMAGES)).argmax(-1))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_choice_among_few_networks_is_noise(count: int):
    """Two calls after one seed often fall the same way."""
    model = wrap(Around(lambda net, x: net(random.choice([x, *((k + 1) * x for k in range(1, count))]))).eval(), IMAGES)
    assert isinstance(model, Wrapped)
    assert model.stochastic
    assert [finding.name for finding in model.findings] == ["random"]
    with rng.draw(list(range(16))):
        draws = model(IMAGES)
    assert any(not torch.equal(draws[0], draw) for draw in draws)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x: net(x - x.mean(0)), "other images of the batch"),
        (lambda net, x: net(x - x.mean(0) + 0.05 * torch.randn_like(x)), "other images of the batch"),
        (lambda net, x: net(x) * float("nan"), "finite outputs, got NaN"),
        (lambda net, x: x, r"logits of shape \(16, classes\), got torch.float32 of shape \(16, 1, 4, 4\)"),
        (lambda net, x: net(x).argmax(-1), r"got torch.int64 of shape \(16,\)"),
        (lambda net, x: net(x)[:, :1], r"of shape \(16, 1\)"),
        (lambda net, x: "three", "expected a tensor of logits, or an output with `.logits`, got str"),
        (lambda net, x: net(x[:, :, :2]), "expected a model that takes float images of shape"),
        (lambda net, x: net(x)[:, :2], "expected labels from 0 to 1, the model's classes, got 0 to 2"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_reason(function: Callable[[nn.Module, Tensor], object], message: str):
    with pytest.raises(InputError, match=message):
        wrap(Around(function).eval(), IMAGES, torch.arange(20) % 3)


def test_a_model_in_training_mode_is_copied_and_left_alone():
    module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.BatchNorm1d(16), nn.Linear(16, 3)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = wrap(module, IMAGES)
    assert [finding.name for finding in model.findings] == ["training-mode"]
    assert not model.stochastic
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_batch_norm_left_in_training_mode_is_refused():
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3)).eval()
    module[1].train()
    with pytest.raises(InputError, match="batch norm in training mode"):
        wrap(module, IMAGES)


def test_no_gradient_even_when_relaxed_is_said():
    class Dead(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 0 * gradient

    model = wrap(Around(lambda net, x: net(Dead.apply(x))).eval(), IMAGES)
    assert model.needs_relaxing
    assert "only attacks without gradients" in model.findings[0].text


def test_the_relaxed_copy_returns_the_same_and_has_gradients():
    model = wrap(Around(lambda net, x: net((x * 3).round() / 3)).eval(), IMAGES)
    copy = model.relaxed_copy()
    leaf = IMAGES.clone().requires_grad_()
    assert torch.equal(copy(leaf), model(IMAGES))
    (found,) = torch.autograd.grad(copy(leaf).sum(), leaf)
    assert float(found.abs().max()) > 0


@pytest.mark.parametrize(("rounded", "names"), [(False, ["not-relaxed"]), (True, ["not-relaxed", "zero-gradient"])])
def test_a_model_that_fails_under_relaxed_derivatives_is_judged_by_its_own(rounded: bool, names: list[str]):
    def function(net: nn.Module, x: Tensor) -> Tensor:
        if x.detach().requires_grad:
            raise TypeError("no leaf")
        return net((3 * x).round() / 3 if rounded else x)

    model = wrap(Around(function).eval(), IMAGES)
    assert [finding.name for finding in model.findings] == names
    assert "TypeError: no leaf" in model.findings[0].text
    assert torch.equal(model.relaxed_copy()(IMAGES), model(IMAGES))


def test_quantizers_of_ours_take_their_noise_from_the_draw():
    quantized = convert(network(), Policy(weight_bits=3, activation_bits=3)).eval()
    model = wrap(quantized, IMAGES)
    assert model.stochastic
    assert model.noise == "none"
    with rng.draw([1, 2]):
        both = model(IMAGES)
    with rng.draw([2], torch.arange(20)[5:]):
        rest = model(IMAGES[5:])
    assert torch.equal(both[1, :, 5:], rest[0])
    ensemble = Ensemble([quantized]).eval()
    assert wrap(ensemble, IMAGES) is ensemble


def test_normalization_belongs_into_the_model():
    colours = torch.rand(4, 3, 2, 2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    model = wrap(net, colours, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])
    scale = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    assert torch.allclose(model(colours)[0, 0], net((colours - scale[0]) / scale[1]))
    with pytest.raises(InputError, match="positive deviation for each channel"):
        Normalized(net, [0.5], [0.0])
    for ready in (model, Ensemble([net]).eval()):
        with pytest.raises(InputError, match=f"got a {type(ready).__name__} with a mean"):
            wrap(ready, colours, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.1])


def test_features_are_what_the_last_layer_is_given():
    model = wrap(Around(lambda net, x: net(x)).eval(), IMAGES)
    hidden = model.module.network[:3](IMAGES)
    assert torch.allclose(model.features(IMAGES)[0], hidden)
    bare = wrap(Around(lambda net, x: x.flatten(1)[:, :3]).eval(), IMAGES)
    bare.module.network = nn.Identity()
    assert torch.equal(bare.features(IMAGES)[0], IMAGES.flatten(1)[:, :3])
