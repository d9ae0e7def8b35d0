"""Test DoReFa's and PACT's quantizers against their formulas on hand-made numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from bitquorum import rng, zoo
from bitquorum.conversion import calibrate, quantizers, restore, share_weights
from bitquorum.dorefa import Dorefa, Pact, unit_tanh
from bitquorum.interface import InputError, NoEffectWarning
from bitquorum.layers import QuantActivation, QuantImage, QuantLayer
from bitquorum.quantizers import Deterministic, Quantizer
from bitquorum.quantizers.twin import twin


def layer(weight, **bits) -> Any:
    """Return a quantized linear layer of one output with given weights."""
    linear = nn.Linear(len(weight), 1, bias=False).double()
    linear.weight.data = torch.tensor([weight], dtype=torch.float64)
    network = nn.Sequential(nn.Identity(), linear)
    return Dorefa(first=True, linear=True, last=True, **bits)(network)


def formula(weight, bits):
    """Return DoReFa's weights as the paper writes them."""
    w, top = torch.tensor(weight, dtype=torch.float64).tanh(), 2**bits - 1
    return 2 * ((w / (2 * w.abs().max()) + 0.5) * top).round() / top - 1


def inner(network) -> Any:
    return [module for module in network.modules() if isinstance(module, QuantLayer)]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_weights_follow_the_formula(bits):
    weight = [0.03, -0.4, 1.7, -0.9, 0.25, 0.0]
    (quantized,) = inner(layer(weight, weight_bits=bits))
    found = quantized(torch.eye(6, dtype=torch.float64))[:, 0].detach()
    assert torch.allclose(found, formula(weight, bits), atol=1e-6)
    assert len(found.unique()) <= 2**bits
    assert float(found.max()) == pytest.approx(1.0)


def test_known_values_of_two_bits():
    (quantized,) = inner(layer([2.0, 0.5, 0.1, -0.1, -5.0], weight_bits=2))
    found = quantized(torch.eye(5, dtype=torch.float64))[:, 0]  # tanh over its maximum: .96 .46 .10 -.10 -1
    assert found.tolist() == pytest.approx([1.0, 1 / 3, 1 / 3, -1 / 3, -1.0], abs=1e-6)


def test_the_gradient_of_a_weight_is_that_of_the_squashing():
    (quantized,) = inner(layer([0.3, -0.8, 0.1], weight_bits=2))
    weight = quantized.layer.weight
    (found,) = torch.autograd.grad(quantized(torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)).sum(), weight)
    t = weight.detach().tanh()[0]
    top = t[1].abs()
    expected = torch.stack([(1 - t[0] ** 2) / top, t[0] / top**2 * (1 - t[1] ** 2), torch.zeros_like(top)])
    assert torch.allclose(found[0], expected)  # the second weight is the largest: it moves the scale; it is negative
    assert torch.autograd.gradcheck(unit_tanh, (weight.detach().clone().requires_grad_(),))


def test_weights_of_zero_stay_finite():
    with pytest.warns(NoEffectWarning, match="weights are all zero"):
        (quantized,) = inner(layer([0.0, 0.0]))
    assert quantized(torch.ones(1, 2, dtype=torch.float64)).isfinite().all()


def test_inputs_are_clipped_to_the_unit_interval_and_rounded():
    model: Any = Dorefa(activation_bits=2, linear=True, last=True)(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
    quantize = model[1].inputs
    x = torch.tensor([-3.0, -0.1, 0.1, 0.2, 0.5, 0.7, 0.9, 1.0, 4.0], requires_grad=True)
    value = quantize(x)
    assert value.tolist() == pytest.approx([0, 0, 0, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])  # half to even: 1.5 -> 2
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0]
    seen: list[torch.Tensor] = []
    model[1].inputs.register_forward_hook(lambda _, args, output: seen.append(output))
    logits = model(torch.randn(5, 4))
    weight = model[1].quantizer(unit_tanh(model[1].layer.weight))
    assert torch.allclose(logits, seen[0] @ weight.T + model[1].layer.bias)
    assert set(seen[0].unique().tolist()) <= set(quantize.levels().tolist())


def names(network, kind: Any = QuantLayer):
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({}, ["conv2", "conv3"]),
        ({"first": True}, ["conv1", "conv2", "conv3"]),
        ({"linear": True}, ["conv2", "conv3", "hidden"]),
        ({"linear": True, "last": True}, ["conv2", "conv3", "hidden", "classifier"]),
        ({"last": True}, ["conv2", "conv3"]),
    ],
)
def test_which_layers_are_quantized(options, quantized):
    network = zoo.CIFARconv(width=4)(classes=3, shape=(3, 15, 15))
    found: Any = Dorefa(weight_bits=2, activation_bits=3, **options)(network)
    first = bool(options.get("first"))
    assert isinstance(found, QuantImage) == first
    assert [name.removeprefix("network.") for name in names(found)] == quantized
    bits = {name.removeprefix("network."): quantizer.bits for name, quantizer in quantizers(found)}
    inputs = [name for name in quantized if name != "conv1"]
    expected = {f"{name}.quantizer": 2 for name in quantized} | {f"{name}.inputs": 3 for name in inputs}
    assert bits == expected | ({"quantizer": 3} if first else {})
    assert names(restore(found)) == []


def test_empir_rounds_the_image_before_the_network_normalizes_it():
    network = zoo.CIFARconv(width=4)(classes=3, shape=(3, 15, 15))
    found: Any = Dorefa(activation_bits=2, first=True)(network)
    seen: list[torch.Tensor] = []
    found.network.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = rng.uniform(1, torch.arange(2), 675).view(2, 3, 15, 15)
    found(x)
    assert torch.allclose(seen[0], ((x * 3).round() / 3 - 0.5) / 0.25, atol=1e-5)


def test_calibration_and_sharing_leave_fixed_ranges_alone():
    members: Any = [Dorefa()(zoo.DigitsNet(width=4)(classes=3, shape=(1, 8, 8))) for _ in range(2)]
    share_weights(members)
    assert members[0].conv2.layer.weight is members[1].conv2.layer.weight
    calibrate(members[1], torch.rand(8, 1, 8, 8))
    for _, quantizer in quantizers(members[1]):
        assert not list(quantizer.parameters())
        assert float(quantizer.levels()[-1]) == pytest.approx(1.0)


def test_the_unquantized_twin_keeps_transform_and_clip():
    model: Any = layer([0.3, -0.8, 0.1], weight_bits=1, activation_bits=1)
    x = torch.tensor([[0.2, 3.0, -1.0]], dtype=torch.float64)
    with twin("float"):
        found = model(x)
    weight = unit_tanh(torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64))
    assert float(found.detach()) == pytest.approx(float(0.2 * weight[0] + weight[1]))


@pytest.mark.parametrize("conversion", [Dorefa, Pact])
def test_bad_bits_are_refused(conversion):
    with pytest.raises(InputError, match=r"integer in \[1, 8\], got 9"):
        conversion(activation_bits=9)
    with pytest.raises(InputError, match=r"integer in \[1, 8\], got 0"):
        conversion(weight_bits=0)


# PACT


def test_the_clipping_level_learns_from_what_is_clipped_alone():
    quantize = Quantizer(2, high=3.0, learned="pact", law=Deterministic()).double()
    x = torch.tensor([-1.0, 0.4, 1.6, 2.9, 3.2, 8.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4, 1e5], dtype=torch.float64)
    value = quantize(x)
    assert value.tolist() == pytest.approx([0, 0, 2, 3, 3, 3], rel=1e-6)
    slope, range_slope = torch.autograd.grad((value * upstream).sum(), [x, quantize.log_step])
    assert torch.equal(slope, upstream * torch.tensor([0, 1, 1, 1, 0, 0]))
    assert float(range_slope) / 3 == pytest.approx(1.1e5, rel=1e-6)  # the level is 3 exp(log_step - its start)


def test_the_pact_gradient_has_no_rounding_term_unlike_lsq():
    x = torch.linspace(0.05, 0.95, 37)
    cases: Any = (("pact", True), (True, False))
    for learned, zero in cases:
        quantize = Quantizer(2, high=1.0, learned=learned, law=Deterministic())
        (found,) = torch.autograd.grad(quantize(x).square().sum(), quantize.log_step)
        assert (float(found) == 0) == zero


def test_pact_needs_one_range_from_zero():
    cases: Any = ({"grid": "symmetric"}, {"channels": 3})
    for options in cases:
        with pytest.raises(InputError, match="pact with a one-sided grid and one range"):
            Quantizer(2, learned="pact", **options)


def test_pact_takes_the_place_of_every_relu_and_spares_both_ends():
    network = zoo.CIFARconv(width=4)(classes=3, shape=(3, 15, 15))
    found = Pact(weight_bits=3, activation_bits=2)(network)
    assert names(found) == ["conv2", "conv3", "hidden"]
    assert names(found, QuantActivation) == ["activation1", "activation2", "activation3"]
    ranges = [name for name, _ in found.named_parameters() if "quantizer" in name]
    assert ranges == [f"activation{place}.quantizer.log_step" for place in (1, 2, 3)]
    with pytest.raises(InputError, match=r"expected ReLU activations, .* got GELU"):
        Pact()(zoo.DigitsNet(activation="gelu")(classes=3, shape=(1, 8, 8)))
