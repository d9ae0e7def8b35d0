"""Check every builder of the zoo: known parameter counts, the contract of every network, bad arguments."""

import copy
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitquorum import kernels, zoo
from bitquorum.interface import InputError
from bitquorum.registry import registered
from bitquorum.zoo.network import BatchNorm

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)
SMALL = {
    "linear": zoo.Linear(),
    "digits": zoo.DigitsNet(width=4),
    "digits-none": zoo.DigitsNet(width=4, norm="none", activation="softplus"),
    "cifarconv": zoo.CIFARconv(width=4),
    "mnistconv": zoo.MNISTconv(width=4),
    "small": zoo.SmallResNet(widths=(4, 6, 8)),
    "small-strided": zoo.SmallResNet(widths=(4, 6, 8), stem_stride=2),
    "small-aligned": zoo.SmallResNet(widths=(4, 6, 8), stem_stride=2, stem_kernel=6, aligned=True),
    "small-odd": zoo.SmallResNet(widths=(4, 6, 8), stem_stride=2, aligned=True),
    "small-deep": zoo.SmallResNet(widths=(4, 6, 8), blocks=2),
    "small-none": zoo.SmallResNet(widths=(4, 4, 6), norm="none", activation="silu"),
    "resnet-cifar": zoo.ResNetCifar(depth=14, width=4),
    "resnet18": zoo.ResNet18(width=4, norm="group"),
    "preact18": zoo.PreActResNet18(width=4),
    "wide": zoo.WideResNet(depth=10, width=1, norm="group"),
    "wider": zoo.WideResNet(depth=16, width=2),
}
assert {type(network) for network in SMALL.values()} == set(registered(zoo.Network).values()), "one is not tested"
SMOOTH = {
    "digits": (zoo.DigitsNet(width=4, activation="softplus"), DIGITS),
    "cifarconv": (zoo.CIFARconv(width=4, activation="silu"), CIFAR),
    "mnistconv": (zoo.MNISTconv(width=4, activation="gelu"), MNIST),
    "small-batch": (zoo.SmallResNet(widths=(4, 6, 8)), DIGITS),
    "small-group": (zoo.SmallResNet(widths=(4, 6, 8), norm="group"), DIGITS),
    "resnet18": (zoo.ResNet18(width=4, activation="silu"), DIGITS),
    "wide": (zoo.WideResNet(depth=10, width=1, activation="softplus"), DIGITS),
}
every = pytest.mark.parametrize("builder", SMALL.values(), ids=SMALL.keys())


def build(builder, *, classes=10, shape=None, seed=0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return builder(classes=classes, shape=shape or natural(builder))


def natural(builder):
    return {zoo.CIFARconv: CIFAR, zoo.MNISTconv: MNIST}.get(type(builder), DIGITS)


def images(shape, count=3, dtype=torch.float32):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def parameters(builder, shape=CIFAR):
    with torch.device("meta"):
        return sum(p.numel() for p in builder(classes=10, shape=shape).parameters())


@every
@pytest.mark.parametrize("shape", [DIGITS, MNIST, CIFAR, (2, 33, 29)], ids=str)
def test_logits_and_features_have_the_declared_shapes(builder, shape):
    if min(shape[1:]) < builder.smallest:
        with pytest.raises(InputError, match=f"at least {builder.smallest}, got 8"):
            build(builder, shape=shape)
        return
    network = build(builder, classes=7, shape=shape)
    x = images(shape)
    features = network[:-1](x)
    assert isinstance(network.normalize, zoo.Normalize)
    assert isinstance(network.classifier, nn.Linear)
    assert [*network.named_children()][-1][0] == "classifier"
    assert features.shape == (3, network.classifier.in_features)
    assert network(x).shape == (3, 7)


@every
def test_smallest_image_works_and_one_pixel_less_fails(builder):
    least = builder.smallest
    network = build(builder, shape=(1, least, least)).eval()
    assert network(images((1, least, least))).shape == (3, 10)
    with pytest.raises(InputError, match=f"width of the images of {type(builder).__name__}"):
        builder(classes=10, shape=(1, least, least - 1))


@every
def test_every_module_is_called_exactly_once(builder):
    network = build(builder)
    calls = Counter()
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    network(images(natural(builder)))
    assert calls == Counter(name for name, _ in network.named_modules())


@every
def test_activation_field_reaches_every_activation(builder):
    kinds = tuple(type(zoo.ACTIVATIONS[name]()) for name in zoo.ACTIVATIONS)
    used = [type(module) for module in build(builder).modules() if isinstance(module, kinds)]
    wanted = getattr(builder, "activation", None)
    assert set(used) == ({type(zoo.ACTIVATIONS[wanted]())} if wanted else set())


@pytest.mark.parametrize(("builder", "shape"), SMOOTH.values(), ids=SMOOTH.keys())
def test_input_gradient_penalty_of_a_smooth_network_has_finite_gradients(builder, shape):
    network = build(builder, shape=shape).double()
    x = images(shape, dtype=torch.float64).requires_grad_()
    loss = nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    seconds = torch.autograd.grad(gradient.square().sum(), list(network.parameters()), allow_unused=True)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    unused = [name for (name, _), s in zip(network.named_parameters(), seconds, strict=True) if s is None]
    assert set(unused) <= {"classifier.bias"}
    assert all(s.isfinite().all() for s in seconds if s is not None)
    assert sum(float(s.abs().sum()) for s in seconds if s is not None) > 0


def test_second_derivative_agrees_with_finite_differences():
    network = build(zoo.SmallResNet(widths=(2, 3, 4), norm="group"), shape=DIGITS).double()
    x = images(DIGITS, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(network, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True)


@every
def test_deepcopy_and_state_dict_keep_the_function(builder):
    network, other = build(builder, seed=0).eval(), build(builder, seed=1).eval()
    x = images(natural(builder))
    assert not torch.equal(network(x), other(x))
    twin = copy.deepcopy(network)
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x), twin(x))
    assert torch.equal(network(x), other(x))
    assert not {id(p) for p in network.parameters()} & {id(p) for p in twin.parameters()}


@every
def test_weights_are_a_function_of_the_seed(builder):
    first, second, third = build(builder, seed=3), build(builder, seed=3), build(builder, seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.classifier.weight, third.classifier.weight)


@every
def test_builder_is_its_own_configuration(builder):
    values = {field.name: getattr(builder, field.name) for field in fields(builder)}
    assert type(builder)(**values) == builder
    assert hash(type(builder)(**values)) == hash(builder)


def test_initial_weights_have_the_variance_of_he():
    network = build(zoo.DigitsNet(width=64, norm="none"), classes=1000)
    for module, variance in ((network.conv3, 2 / (128 * 9)), (network.classifier, 1 / 256)):
        spread = variance * (2 / module.weight.numel()) ** 0.5
        assert module.weight.square().mean().item() == pytest.approx(variance, abs=4 * spread)
        assert not module.bias.any()


@pytest.mark.parametrize(
    ("builder", "shape", "count"),
    [
        (zoo.Linear(), DIGITS, 650),
        (zoo.CIFARconv(), CIFAR, 25 * (3 * 32 + 32 * 32 + 32 * 64) + 64 * 9 * 64 + 64 * 10),
        (zoo.MNISTconv(), MNIST, 64 * 64 + 36 * 64 * 128 + 25 * 128 * 128 + 128 * 10),
        (zoo.SmallResNet(), CIFAR, parameters(zoo.ResNetCifar(depth=8))),
        (zoo.ResNetCifar(depth=20), CIFAR, 269_722),
        (zoo.ResNetCifar(depth=32), CIFAR, 464_154),
        (zoo.ResNetCifar(depth=44), CIFAR, 658_586),
        (zoo.ResNetCifar(depth=56), CIFAR, 853_018),
        (zoo.ResNetCifar(depth=110), CIFAR, 1_727_962),
        (zoo.ResNet18(), CIFAR, 11_173_962),
        (zoo.PreActResNet18(), CIFAR, 11_171_146 + 2 * 512),
        (zoo.WideResNet(depth=28, width=10), CIFAR, 36_479_194),
        (zoo.WideResNet(depth=40, width=4), CIFAR, 8_949_210),
    ],
    ids=str,
)
def test_parameter_counts_of_the_literature(builder, shape, count):
    assert parameters(builder, shape) == count


def test_a_strided_stem_halves_every_side_and_keeps_the_weights():
    plain, strided = zoo.SmallResNet(widths=(4, 6, 8)), zoo.SmallResNet(widths=(4, 6, 8), stem_stride=2)
    assert parameters(plain) == parameters(strided)
    sides = [build(net, shape=CIFAR)[:-3](images(CIFAR)).shape[-1] for net in (plain, strided)]
    assert sides == [8, 4]
    with pytest.raises(InputError, match="expected stem_stride to be an integer of at least 1, got 0"):
        zoo.SmallResNet(stem_stride=0)


def test_an_aligned_network_sees_the_mirror_image_as_it_sees_the_image():
    def mirrored_features(**options: Any) -> list[torch.Tensor]:
        network = build(zoo.SmallResNet(widths=(4, 6, 8), stem_stride=2, **options), shape=CIFAR).eval()
        x = images(CIFAR)
        features = network[:-3](x)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.copy_(module.weight.flip(3))
        return [features.flip(3), network[:-3](x.flip(3))]

    torch.testing.assert_close(*mirrored_features(stem_kernel=6, aligned=True))
    for options in ({}, {"stem_kernel": 6}, {"aligned": True}):
        expected, found = mirrored_features(**options)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() > 0.1


def test_an_aligned_block_takes_the_mean_of_the_pixels_it_skips():
    block = zoo.BasicBlock(4, 6, stride=2, activation="relu", norm="none", aligned=True)
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()  # type: ignore[union-attr]
    x = images((4, 6, 6))
    assert block.conv1.kernel_size == (4, 4)
    torch.testing.assert_close(block(x)[:, :4], x.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5)))
    assert zoo.BasicBlock(4, 4, stride=1, activation="relu", norm="none", aligned=True).conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(("stride", "kernel"), [(None, 6), (3, 4), (4, 2)])
def test_an_even_stem_needs_an_even_stride(stride, kernel):
    with pytest.raises(InputError, match=f"an even stem_stride that is no larger, got {kernel} and {stride or 1};"):
        zoo.SmallResNet(stem_stride=stride, stem_kernel=kernel)


def test_more_blocks_are_the_deeper_network_of_the_family():
    deep = zoo.SmallResNet(widths=(4, 8, 16), blocks=2, activation="relu")
    assert parameters(deep) == parameters(zoo.ResNetCifar(depth=14, width=4))
    with pytest.raises(InputError, match="expected blocks to be an integer of at least 1, got 0"):
        zoo.SmallResNet(blocks=0)


@pytest.mark.parametrize(
    ("builder", "small", "large"),
    [
        (zoo.SmallResNet(), 7, 0),
        (zoo.ResNetCifar(depth=20), 19, 0),
        (zoo.ResNet18(), 17, 3),
        (zoo.PreActResNet18(), 17, 3),
        (zoo.WideResNet(depth=28, width=2), 25, 3),
        (zoo.WideResNet(depth=28, width=1), 25, 2),
    ],
    ids=str,
)
def test_depth_counts_the_convolutions(builder, small, large):
    with torch.device("meta"):
        network = builder(classes=10, shape=CIFAR)
    kernels = Counter(module.kernel_size[0] for module in network.modules() if isinstance(module, nn.Conv2d))
    assert (kernels[3], kernels[1]) == (small, large)


@pytest.mark.parametrize(
    ("builder", "shape", "sides"),
    [
        (zoo.CIFARconv(width=2), CIFAR, [32, 15, 15, 15, 15, 7, 7, 7, 3]),
        (zoo.MNISTconv(width=2), MNIST, [14, 14, 5, 5, 1, 1]),
    ],
    ids=str,
)
def test_empir_networks_have_the_sides_of_their_source(builder, shape, sides):
    network = build(builder, shape=shape)
    stop = [name for name, _ in network.named_children()].index("flatten")
    seen = [network[:count](images(shape)).shape[-1] for count in range(2, stop + 1)]
    assert seen == sides


def test_normalize_is_affine_per_channel():
    x = images(CIFAR)
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    y = zoo.Normalize(mean, std)(x)
    for channel in range(3):
        torch.testing.assert_close(y[:, channel], (x[:, channel] - mean[channel]) / std[channel])


def test_network_uses_the_constants_it_is_given():
    network: Any = zoo.Linear()(classes=2, shape=(1, 1, 2), mean=(0.25,), std=(0.5,))
    with torch.no_grad():
        network.classifier.weight.copy_(torch.eye(2))
    torch.testing.assert_close(network(torch.tensor([[[[0.25, 1.0]]]])), torch.tensor([[0.0, 1.5]]))
    assert set(network.state_dict()) >= {"normalize.mean", "normalize.std"}


def test_blocks_with_silent_branches_are_their_shortcuts():
    x = images((4, 6, 6)) + 0.1
    basic = zoo.BasicBlock(4, 6, stride=2, activation="relu", norm="none")
    plain = zoo.PreActBlock(4, 4, stride=1, activation="relu", norm="batch")
    with torch.no_grad():
        for block in (basic, plain):
            block.conv2.weight.zero_()
        basic.conv2.bias.zero_()  # type: ignore[union-attr]
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(3, 2, 3, 3)], dim=1)
    assert torch.equal(basic(x), expected)
    assert torch.equal(plain(x), x)


def test_digits_network_learns_the_digits():
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels).float().view(-1, *DIGITS) / 16, torch.tensor(target)
    network = build(zoo.DigitsNet())
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    order = torch.randperm(1400, generator=torch.Generator().manual_seed(0))
    for batch in order.repeat(4).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(x[1400:]).argmax(1) == y[1400:]).float().mean()
    assert accuracy > 0.9


BUILDERS = sorted({type(builder) for builder in SMALL.values()}, key=lambda kind: kind.__name__)
WITH = {
    name: [kind for kind in BUILDERS if name in {field.name for field in fields(kind)}]
    for name in ("width", "activation", "norm", "depth")
}


@given(kind=st.sampled_from(WITH["width"]), width=st.integers(max_value=0))
def test_bad_width_fails_at_construction(kind, width):
    with pytest.raises(InputError, match=r"expected width .* got"):
        kind(width=width)


@given(data=st.data(), name=st.sampled_from(["activation", "norm"]), value=st.text(max_size=12))
def test_bad_name_fails_at_construction(data, name, value):
    kind = data.draw(st.sampled_from(WITH[name]))
    if value in (*zoo.ACTIVATIONS, *zoo.NORMS):
        return
    with pytest.raises(InputError, match=f"expected {name} to be one of"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", [zoo.ResNetCifar, zoo.ResNet18, zoo.PreActResNet18, zoo.WideResNet])
def test_deep_networks_need_a_norm(kind):
    with pytest.raises(InputError, match="expected norm to be one of batch, group, got 'none'"):
        kind(norm="none")


@given(kind=st.sampled_from(WITH["depth"]), depth=st.integers(-5, 200))
def test_depth_is_accepted_exactly_in_its_family(kind, depth):
    rest = {zoo.ResNetCifar: 2, zoo.WideResNet: 4}[kind]
    if depth >= 6 and depth % 6 == rest:
        assert kind(depth=depth).depth == depth
    else:
        with pytest.raises(InputError, match="expected depth to be"):
            kind(depth=depth)


@given(widths=st.tuples(*[st.integers(-2, 6)] * 3))
def test_widths_never_fall(widths):
    if min(widths) >= 1 and tuple(sorted(widths)) == widths:
        assert zoo.SmallResNet(widths=widths).widths == widths
    else:
        with pytest.raises(InputError, match=r"expected widths\[\d\] to be"):
            zoo.SmallResNet(widths=widths)


@settings(max_examples=30)
@given(
    classes=st.integers(-1, 3),
    shape=st.tuples(*[st.integers(-1, 3)] * 3),
    mean=st.none() | st.lists(st.floats(-1, 1), max_size=4).map(tuple),
    std=st.none() | st.lists(st.floats(-1, 1), max_size=4).map(tuple),
)
def test_call_accepts_exactly_what_fits(classes, shape, mean, std):
    fitting = all(c is None or len(c) == shape[0] for c in (mean, std)) and min(std or (1.0,)) > 0
    if classes >= 2 and min(shape) >= 1 and fitting:
        network: Any = zoo.Linear()(classes=classes, shape=shape, mean=mean, std=std)
        assert network.classifier.out_features == classes
    else:
        with pytest.raises(InputError, match=r"expected .* got"):
            zoo.Linear()(classes=classes, shape=shape, mean=mean, std=std)


@pytest.mark.parametrize("bad", [(float("nan"),), (float("inf"),), (0.0,), (-1.0,), ()], ids=str)
def test_bad_std_fails(bad):
    with pytest.raises(InputError, match="got mean="):
        zoo.Normalize((0.5,), bad)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4, 8, 8)], ids=str)
def test_images_of_other_channels_fail(shape):
    with pytest.raises(InputError, match=r"expected images \[batch, 1, height, width\], got"):
        build(zoo.Linear())(torch.zeros(shape))


@pytest.mark.long
def test_narrow_residual_networks_train_where_the_library_has_avx2_alone():
    """With `_pointwise` as one strided convolution this ends by a signal, or never."""
    code = """
import torch
from bitquorum import zoo

for builder in (zoo.ResNet18(width=4), zoo.PreActResNet18(width=8)):
    network = builder(classes=10, shape=(3, 32, 32)).to(memory_format=torch.channels_last)
    for batch in (1, 2, 5, 16):
        images = torch.rand(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        network(images).sum().backward()
print("done")
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_channels_fall_only_with_a_projection():
    with pytest.raises(InputError, match="expected extra to be"):
        zoo.BasicBlock(4, 2, stride=1, activation="relu", norm="batch")
    block = zoo.BasicBlock(4, 2, stride=1, activation="relu", norm="batch", project=True)
    assert block(images((4, 3, 3))).shape == (3, 2, 3, 3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frozen_norm_layer_has_the_values_and_derivatives_of_torch(affine: bool, dtype: torch.dtype):
    ours, theirs = BatchNorm(3, affine=affine).to(dtype), torch.nn.BatchNorm2d(3, affine=affine).to(dtype)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    theirs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)):
        x = torch.randn(4, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        found.append((y, gradient, second))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_layer_holds_its_statistics(affine: bool):
    layer = BatchNorm(3, affine=affine, momentum=1.0).double()
    for parameter in layer.parameters():
        parameter.data.uniform_(0.5, 1.5)
    x = 2 * torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    x.requires_grad_()
    with kernels.statistics_held():
        (held,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    second = torch.autograd.grad(held.square().sum(), (x, *layer.parameters()))

    spread = x.var((0, 2, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(spread + layer.eps) * (layer.weight[:, None, None] if affine else 1.0)
    y = (x - x.mean((0, 2, 3), keepdim=True)) * scale + (layer.bias[:, None, None] if affine else 0.0)
    known = 3 * y.square() * scale
    torch.testing.assert_close(held, known)
    torch.testing.assert_close(second, torch.autograd.grad(known.square().sum(), (x, *layer.parameters())))

    count = x.numel() // 3
    layer.running_var.mul_((count - 1) / count)  # from the unbiased variance to the one of the batch
    attacked = x.detach().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(layer.eval()(attacked).pow(3).sum(), attacked)[0], held)


def test_a_norm_layer_in_training_equals_that_of_torch():
    ours, theirs = BatchNorm(3), torch.nn.BatchNorm2d(3)
    found = []
    for layer in (ours, theirs):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        found.append((y, gradient, *torch.autograd.grad(gradient.square().sum(), (x, layer.weight))))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.zeros(1, 3, 1, 1))


def test_a_norm_layer_whose_parameters_are_trained_in_evaluation_mode_has_their_gradients():
    layer = BatchNorm(3).eval()
    layer(torch.randn(4, 3, 5, 5).requires_grad_()).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is not None


def test_a_frozen_norm_layer_keeps_half_precision():
    layer = BatchNorm(3).eval().requires_grad_(False)
    x = torch.randn(4, 3, 5, 5, dtype=torch.bfloat16).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
