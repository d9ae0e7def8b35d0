"""Test that bounds are never left: by points, draws and enumeration; and that they are exact where they can be."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.bounds import SMALLEST, Bound, Scope, Validity, ball, margins, output, propagate
from bitquorum.bounds.activations import SHAPES
from bitquorum.bounds.nodes import Box, Elementwise
from bitquorum.bounds.quantizers import _NOISE_SLACK
from bitquorum.conversion import Conversion, Policy, calibrate, convert, is_stochastic
from bitquorum.dorefa import Dorefa, Pact
from bitquorum.interface import InputError, SharedNoiseWarning
from bitquorum.layers import QuantActivation, QuantLayer
from bitquorum.quantizers import (
    Deterministic,
    Gaussian,
    Law,
    Logistic,
    Quantizer,
    SmoothRounding,
    StochasticRounding,
    twin,
)
from bitquorum.randomized import ActivationPruning, GaussianControl, LayerNoise, RandomPrecision, WeightNoise
from bitquorum.zoo import (
    BasicBlock,
    CIFARconv,
    DigitsNet,
    Linear,
    MNISTconv,
    Network,
    PadShortcut,
    PreActResNet18,
    ResNet18,
    ResNetCifar,
    SmallResNet,
    WideResNet,
)

LAWS: dict[str, Law] = {
    "deterministic": Deterministic(),
    "rounding": StochasticRounding(),
    "logistic": Logistic(),
    "gaussian": Gaussian(),
    "smooth-rounding": SmoothRounding(),
}


NETWORKS: dict[str, tuple[Network, int]] = {
    "linear": (Linear(), 4),
    "digits": (DigitsNet(width=3, activation="silu"), 6),
    "digits-group": (DigitsNet(width=3, activation="gelu", norm="group"), 6),
    "cifarconv": (CIFARconv(width=2), 15),
    "mnistconv": (MNISTconv(width=2), 28),
    "small": (SmallResNet(widths=(2, 3, 4)), 6),
    "aligned": (SmallResNet(widths=(2, 3, 4), stem_stride=2, stem_kernel=6, aligned=True), 8),
    "resnet8": (ResNetCifar(depth=8, width=2, activation="softplus"), 6),
    "resnet18": (ResNet18(width=2), 6),
    "preact18": (PreActResNet18(width=2), 6),
    "wide": (WideResNet(depth=10, width=1, norm="group"), 6),
}


EXACT = Scope(rounding=False)


BOUNDS: tuple[Bound, ...] = ("ibp", "crown-ibp")


CONVERSIONS: list[Conversion] = [
    Dorefa(first=True, linear=True),
    Pact(),
    GaussianControl(),
    LayerNoise(),
    WeightNoise(),
]


def build(builder: Network, side: int, conversion: Conversion | None, images: Tensor) -> nn.Module:
    network = builder(classes=3, shape=(1, side, side))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    network = network if conversion is None else conversion(network)
    calibrate(network, images)
    return network.eval().requires_grad_(False)


def points(images: Tensor, epsilon: float, count: int) -> Tensor:
    """Return images of the ball, [count * batch, ...]: the image itself, corners and points inside."""
    many = images.repeat(count, *[1] * (images.dim() - 1))
    step = torch.rand_like(many) * 2 - 1
    half = len(many) // 2
    step[:half] = step[:half].sign()
    step[: len(images)] = 0
    return (many + epsilon * step).clamp(0, 1)


def check_sound(network: nn.Module, images: Tensor, *, epsilon: float = 6 / 255, count: int = 40) -> None:
    """Check every scope: no point of the ball, under the draws it speaks of, leaves logits or margins."""
    labels, index = torch.arange(len(images)) % 3, torch.arange(len(images))
    validities: tuple[Validity, ...] = ("all", "fresh", "nearest") if is_stochastic(network) else ("all",)
    for validity in validities:
        scope = Scope(validity=validity)
        with rng.draw(3, index):
            node = output(network, images.double(), epsilon=epsilon, scope=scope)
            ibp, crown = (
                margins(network, images.double(), labels, epsilon=epsilon, bound=bound, scope=scope) for bound in BOUNDS
            )
        assert (crown >= ibp).all()
        logits = respond(network, points(images, epsilon, count), validity, 3, index).double()
        least = (logits.gather(-1, labels.expand(count, -1)[..., None]) - logits).amin(0)
        assert (crown <= least).all(), validity
        assert (logits >= node.lower).all()
        assert (logits <= node.upper).all()


def respond(network: nn.Module, images: Tensor, validity: Validity, seed: int, index: Tensor) -> Tensor:
    """Return logits [count, batch, classes] under the draws that a scope speaks of."""
    if validity == "nearest":
        with twin.twin("nearest"):
            logits = network(images)
    else:
        many = len(images) // len(index)
        examples = index.repeat(many) if validity == "fresh" else torch.arange(len(images))
        with rng.draw(seed, examples):
            logits = network(images)
    return logits.unflatten(0, (-1, len(index)))


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_of_the_ball_leaves_the_bounds_of_any_network(name: str):
    builder, side = NETWORKS[name]
    images = torch.rand(3, 1, side, side)
    check_sound(build(builder, side, None, images), images)
    noisy = list(LAWS.values())[1:]
    law = noisy[list(NETWORKS).index(name) % len(noisy)]
    policy = Policy(weight_bits=4, activation_bits=3, weight_law=law, activation_law=law, image_bits=6)
    check_sound(build(builder, side, policy, images), images)


def test_a_shortcut_of_means_allows_for_the_rounding_of_its_sums():
    images = torch.rand(20, 1, 4, 4)
    shortcut = BasicBlock(1, 2, stride=2, activation="relu", norm="none", aligned=True).shortcut
    point = Box(lower=images.double(), upper=images.double())
    node, exact = (propagate(shortcut, point, Scope(rounding=rounding)) for rounding in (True, False))
    rounded = shortcut(images).double()
    assert (rounded != exact.lower).any()
    assert ((node.lower <= rounded) & (rounded <= node.upper)).all()
    choice = propagate(PadShortcut(extra=1, stride=2), point, Scope())
    assert torch.equal(choice.lower, choice.upper)


@pytest.mark.long
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("bits", [1, 8])
def test_no_point_leaves_the_bounds_of_any_law(law: str, bits: int):
    images = torch.rand(3, 1, 6, 6)
    policy = Policy(weight_bits=bits, activation_bits=bits, weight_law=LAWS[law], activation_law=LAWS[law])
    network = build(SmallResNet(widths=(2, 3, 4)), 6, policy, images)
    check_sound(network, images)
    check_sound(network, images, epsilon=0.0, count=2)  # nothing is loose there but the allowance for rounding


@pytest.mark.parametrize("conversion", CONVERSIONS, ids=lambda conversion: type(conversion).__name__)
def test_no_point_leaves_the_bounds_of_any_conversion(conversion: Conversion):
    images = torch.rand(3, 1, 6, 6)
    check_sound(build(DigitsNet(width=3), 6, conversion, images), images)


def test_a_random_precision_is_bounded_by_the_networks_that_a_draw_can_choose():
    images, labels = torch.rand(3, 1, 6, 6), torch.arange(3)
    network = build(DigitsNet(width=3), 6, RandomPrecision(bits=(2, 3, 4)), images)

    def bound(validity: Validity, module: nn.Module = network) -> Tensor:
        return margins(module, images.double(), labels, epsilon=0.01, scope=Scope(validity=validity))

    each = [bound("all", alternative) for alternative in network.alternatives]  # type: ignore[union-attr, arg-type]
    assert torch.equal(bound("all"), torch.stack(each).amin(0))
    assert torch.equal(bound("nearest"), each[-1])
    seen = set()
    for seed in range(12):
        with rng.draw(seed, labels):
            found, logits = bound("fresh"), network(images)
        seen.add(next(number for number, one in enumerate(each) if torch.equal(one, found)))
        assert (found <= logits.gather(1, labels[:, None]) - logits).all()
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_ranges_of_activations_are_exact_and_their_lines_hold(kind: type[nn.Module]):
    low = torch.rand(400, 3, dtype=torch.float64) * 14 - 9
    high = low + torch.rand(400, 3, dtype=torch.float64).square() * 12
    module = kind()
    node = propagate(module, Box(lower=low, upper=high), EXACT)
    assert isinstance(node, Elementwise)
    x = low + (high - low) * torch.linspace(0, 1, 257, dtype=torch.float64)[:, None, None]
    y = module.double()(x)
    lines = node.lines()
    assert (y >= x * lines.slope_below + lines.offset_below - 1e-9).all()
    assert (y <= x * lines.slope_above + lines.offset_above + 1e-9).all()
    assert (node.lower <= y.amin(0) + 1e-12).all()
    assert (node.upper >= y.amax(0) - 1e-12).all()
    assert torch.allclose(node.lower, y.amin(0), atol=2e-3)
    assert torch.allclose(node.upper, y.amax(0), atol=2e-3)


def test_an_activation_may_turn_where_it_has_a_kink():
    low, high = torch.full((1, 1), -1.0), torch.full((1, 1), 1.0)
    node = propagate(nn.ELU(alpha=-1.0), Box(lower=low, upper=high), EXACT)
    assert float(node.lower) == 0


def on_intervals(quantizer: Quantizer) -> tuple[Elementwise, Tensor]:
    """Return the node of a quantizer on random intervals, and points from end to end of each, [points, ...]."""
    low = torch.rand(300, 2, dtype=torch.float64) * 6 - 3
    high = low + torch.rand(300, 2, dtype=torch.float64).square() * 3
    node = propagate(quantizer, Box(lower=low, upper=high), EXACT)
    assert isinstance(node, Elementwise)
    return node, low + (high - low) * torch.linspace(0, 1, 65, dtype=torch.float64)[:, None, None]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("grid", ["one-sided", "two-sided", "symmetric"])
def test_bounds_of_a_quantizer_are_exact_and_its_lines_hold(law: str, grid: str):
    quantizer = Quantizer(3, grid=grid, low=-1.0, high=2.0, law=LAWS[law], learned=False)  # type: ignore[arg-type]
    node, x = on_intervals(quantizer)
    lines = node.lines()
    seen = []
    for u in (SMALLEST, 0.1, 0.5, 0.93, 1 - SMALLEST):
        y = quantizer(x, noise=torch.full_like(x, u))
        assert (y >= x * lines.slope_below + lines.offset_below - 1e-6).all()
        assert (y <= x * lines.slope_above + lines.offset_above + 1e-6).all()
        seen.append(y)
    assert torch.equal(node.lower, torch.cat(seen).amin(0))
    assert torch.equal(node.upper, torch.cat(seen).amax(0))


def test_lines_of_a_quantizer_touch_its_staircase():
    quantizer = Quantizer(3, grid="two-sided", low=-1.0, high=2.0, law=SmoothRounding(), learned=False)
    node, x = on_intervals(quantizer)
    lines = node.lines()
    least, most = (quantizer(x, noise=torch.full_like(x, u)) for u in (SMALLEST, 1 - SMALLEST))
    below = (least - x * lines.slope_below - lines.offset_below).amin(0)
    above = (x * lines.slope_above + lines.offset_above - most).amin(0)
    assert (torch.maximum(below, above) <= (x[-1] - x[0]) / 64 + 1e-9).all()  # a corner may lie between two points
    assert (lines.slope_below > 0).any()


def test_lines_allow_for_noise_that_errs_in_its_last_digits():
    """At the edges of a staircase, where the kernels' noise may lie on the other side of a threshold."""
    quantizer = Quantizer(4, grid="two-sided", low=-0.7, high=1.9, law=Deterministic(), learned=False)
    levels = quantizer.levels().double()
    error = 0.9 * _NOISE_SLACK * (levels[1] - levels[0])
    x = ((levels[1:] + levels[:-1]) / 2).repeat(200)
    node = propagate(quantizer, Box(lower=x - 0.3 * torch.rand_like(x), upper=x + 0.3 * torch.rand_like(x)), Scope())
    assert isinstance(node, Elementwise)
    lines = node.lines()
    for shift in (-error, error):
        point, y = x - shift / 2, quantizer(x + shift / 2)
        assert (y >= point * lines.slope_below + lines.offset_below).all()
        assert (y <= point * lines.slope_above + lines.offset_above).all()
        assert (y >= node.lower).all()
        assert (y <= node.upper).all()


@pytest.mark.parametrize("policy", [None, Policy(weight_law=Deterministic(), activation_law=SmoothRounding())])
def test_lines_are_tighter_than_intervals_alone(policy: Policy | None):
    images, labels = torch.rand(6, 1, 6, 6), torch.arange(6) % 3
    network = build(DigitsNet(width=4, activation="relu"), 6, policy, images)
    with rng.draw(3, torch.arange(6)):
        ibp, crown = (
            margins(network, images.double(), labels, epsilon=1 / 255, bound=bound, scope=Scope(validity="fresh"))
            for bound in BOUNDS
        )
    assert (crown > ibp + 1e-4).any()


def test_the_smallest_uniform_number_is_that_of_the_kernels():
    many = rng.uniform(0, torch.arange(64), 1 << 16)
    assert many.min() >= SMALLEST
    assert many.max() <= 1 - SMALLEST
    assert float(many.min()) == SMALLEST * (2 * round((float(many.min()) / SMALLEST - 1) / 2) + 1)  # (k + 1/2) / 2^23


def test_a_linear_classifier_has_the_closed_form_and_its_worst_corner():
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3, dtype=torch.float64)).requires_grad_(False)
    network[1].weight.copy_(weight)  # type: ignore[operator]
    network[1].bias.copy_(bias)  # type: ignore[operator]
    images, labels = 0.3 + 0.4 * torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    gap = weight[labels][:, None] - weight
    exact = (gap * images[:, None]).sum(-1) + bias[labels][:, None] - bias - 0.1 * gap.abs().sum(-1)
    corners = torch.tensor(list(itertools.product((-0.1, 0.1), repeat=6)), dtype=torch.float64)
    logits = network[1](images + corners[:, None])
    worst = (logits.gather(-1, labels.expand(64, -1)[..., None]) - logits).amin(0)
    for bound in ("ibp", "crown-ibp"):
        found = margins(network, images, labels, epsilon=0.1, bound=bound, scope=EXACT)
        assert torch.allclose(found, exact, atol=1e-12)
        assert torch.allclose(found, worst, atol=1e-12)


@pytest.mark.parametrize(("law", "bits"), [("rounding", 2), ("logistic", 1)])
def test_bounds_hold_for_every_draw_of_a_tiny_network_by_enumeration(law: str, bits: int):
    """Every level that a weight or an activation can be drawn to, and every image of a grid of the ball."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    policy = Policy(weight_bits=bits, activation_bits=1, weight_law=LAWS[law], activation_law=LAWS[law], learned=False)
    network = convert(network, policy).requires_grad_(False)
    first, middle, last = network[1], network[2], network[3]
    assert isinstance(first, QuantLayer)
    assert isinstance(middle, QuantActivation)
    assert isinstance(last, QuantLayer)
    middle.quantizer.fit_range(torch.rand(50))
    image, epsilon, labels = torch.tensor([[0.4, 0.6]]), 0.05, torch.tensor([0])
    steps = torch.linspace(-epsilon, epsilon, 5)
    grid = image + torch.cartesian_prod(steps, steps)
    node = output(network, image, epsilon=epsilon, scope=EXACT)
    found = {bound: margins(network, image, labels, epsilon=epsilon, bound=bound, scope=EXACT) for bound in BOUNDS}
    lower, upper, least = torch.full((2,), math.inf), torch.full((2,), -math.inf), math.inf
    for weight in weights(first):
        hidden = grid @ weight.T + first.layer.bias
        ends = [middle.quantizer(hidden, noise=torch.full_like(hidden, u)) for u in (SMALLEST, 1 - SMALLEST)]
        choices = [ends[0], ends[1], torch.stack([ends[0][:, 0], ends[1][:, 1]], 1)]
        choices.append(torch.stack([ends[1][:, 0], ends[0][:, 1]], 1))
        for end in weights(last):
            logits = torch.cat(choices) @ end.T + last.layer.bias
            lower, upper = torch.minimum(lower, logits.amin(0)), torch.maximum(upper, logits.amax(0))
            least = min(least, float((logits[:, 0] - logits[:, 1]).min()))
    assert (node.lower[0] <= lower + 1e-5).all()
    assert (node.upper[0] >= upper - 1e-5).all()
    assert all(float(bounds[0, 1]) <= least + 1e-5 for bounds in found.values())
    assert (node.upper[0] - node.lower[0] <= 3 * (upper - lower) + 1e-5).all()  # twice 1.5


def weights(layer: QuantLayer) -> list[Tensor]:
    """Return every weight matrix that can be drawn."""
    weight = layer.layer.weight
    assert isinstance(layer.quantizer, Quantizer)
    low, high = (layer.quantizer.codes(weight, noise=torch.full_like(weight, u)) for u in (SMALLEST, 1 - SMALLEST))
    spans = [range(int(a), int(b) + 1) for a, b in zip(low.flatten(), high.flatten(), strict=True)]
    return [layer.quantizer.decode(torch.tensor(codes).view_as(weight)) for codes in itertools.product(*spans)]


@pytest.mark.parametrize("conversion", [None, Policy()])
def test_a_part_that_stands_at_several_places_is_bounded_at_each(conversion: Conversion | None):
    images, activation = torch.rand(3, 1, 4, 4), nn.ReLU()
    layers = [nn.Linear(16, 16), activation, nn.Linear(16, 16), activation, nn.Linear(16, 3)]
    network = nn.Sequential(nn.Flatten(), *layers)
    if conversion is not None:
        network = conversion(network)
        with pytest.warns(SharedNoiseWarning):
            calibrate(network, images)
    check_sound(network.eval().requires_grad_(False), images)


def test_hooks_and_other_forwards_are_refused():
    """A hook may return anything, and the bounds of what the type says would not hold."""
    images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    before, after, other = (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(3))
    before[1].register_forward_pre_hook(lambda _, args: (args[0].round(),))
    after[1].register_forward_hook(lambda _, args, result: -result)
    other[1].forward = lambda x: x[:, :3]
    for network in (before, after, other, nn.utils.spectral_norm(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))[1])):
        with pytest.raises(InputError, match="got Linear with a hook or a forward of its own"):
            margins(network, images if network in (before, after, other) else images.flatten(1), labels, epsilon=0.1)


def test_modules_without_bounds_are_named():
    images, labels = torch.rand(2, 1, 6, 6), torch.tensor([0, 1])
    pruned = build(DigitsNet(width=2), 6, ActivationPruning(), images)
    for network, name in (
        (nn.Sequential(nn.Flatten(), nn.Softmax(-1)), "Softmax"),
        (pruned, "Pruning"),
        (nn.Sequential(nn.GELU(approximate="tanh"), nn.Flatten()), "GELU without approximation"),
        (nn.Sequential(nn.Softplus(threshold=1), nn.Flatten()), "Softplus of beta above 0 and a threshold of 20"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()), "running statistics"),
        (nn.Sequential(nn.ReLU()), r"logits \[batch, classes\]"),
    ):
        with pytest.raises(InputError, match=name):
            margins(network, images, labels, epsilon=0.1)


def test_bad_scopes_and_radii_are_refused():
    network, images, labels = nn.Flatten(), torch.rand(2, 3), torch.tensor([0, 1])
    noisy = convert(nn.Sequential(nn.Linear(3, 3)), Policy())
    with pytest.raises(InputError, match="one seed"):
        margins(noisy, images, labels, epsilon=0.1, scope=Scope(validity="fresh"))
    with pytest.raises(InputError, match="one seed"), rng.draw([1, 2]):
        margins(noisy, images, labels, epsilon=0.1, scope=Scope(validity="fresh"))
    with pytest.raises(InputError, match="radius"):
        margins(network, images, labels, epsilon=2.0)


def test_the_ball_lies_within_images():
    node = ball(torch.tensor([[0.0, 0.5, 0.98]]), 0.1, EXACT)
    assert torch.allclose(node.lower, torch.tensor([[0.0, 0.4, 0.88]]))
    assert torch.allclose(node.upper, torch.tensor([[0.1, 0.6, 1.0]]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_beyond_the_classes_are_refused(label: int):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with pytest.raises(InputError, match="expected labels from 0 to 2, the model's classes, got"):
        margins(network, torch.rand(2, 1, 2, 2), torch.tensor([0, label]), epsilon=0.1)
