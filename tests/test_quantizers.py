"""Hold quantizers to their grids, their closed forms and their gradients."""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import warnings
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from bitquorum import rng
from bitquorum.information import PlugIn
from bitquorum.interface import GradientMaskingWarning, InputError
from bitquorum.kernels import layout
from bitquorum.quantizers import (
    Deterministic,
    Gaussian,
    Grid,
    Law,
    Logistic,
    Quantizer,
    SmoothRounding,
    StochasticRounding,
    Surrogate,
    concrete,
)
from bitquorum.quantizers.twin import twin as without_noise
from bitquorum.registry import registered
from bitquorum.testing import check_quantizer

FAMILY: Any = Law
LAWS = {name: law() for name, law in registered(FAMILY).items()}
NOISY = {name: law for name, law in LAWS.items() if law.stochastic}
SMOOTH = {
    "logistic": Logistic(),
    "logistic wide": Logistic(scale=0.7),
    "gaussian": Gaussian(),
    "smooth-rounding": SmoothRounding(),
}
METHOD_SLOPES = {0.05: 0.002, 0.10: 0.13, 0.15: 0.44, 0.20: 0.71, 0.25: 0.86, 0.30: 0.94}

every_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
noisy_law = pytest.mark.parametrize("law", NOISY.values(), ids=NOISY)
smooth_law = pytest.mark.parametrize("law", SMOOTH.values(), ids=SMOOTH)
every_grid = pytest.mark.parametrize("grid", get_args(Grid))


def make(bits=3, *, grid: Any = "two-sided", **options) -> Any:
    return Quantizer(bits, grid=grid, low=-0.4, high=1.1, **options)


def draw(quantizer, x, seed=0, examples=None):
    with rng.draw(seed, examples):
        return quantizer(x)


def uniform(seed, *shape):
    return rng.uniform(seed, torch.arange(shape[0]), math.prod(shape[1:])).view(shape)


def gradient(y, x, **options):
    return torch.autograd.grad(y.sum(), x, **options)[0]


def cdf(law, y):
    """Evaluate the distribution function of a law in plain Python."""
    if isinstance(law, Logistic):
        return 1 / (1 + math.exp(-y / law.scale)) if y > -700 * law.scale else 0.0
    if isinstance(law, Gaussian):
        return 0.5 * math.erfc(-y / law.scale / math.sqrt(2))
    if isinstance(law, SmoothRounding):
        above, below = (
            math.log1p(math.exp(-abs(t))) + max(t, 0.0) for t in ((y + 0.5) / law.scale, (y - 0.5) / law.scale)
        )
        return law.scale * (above - below)
    return min(max(y + 0.5, 0.0), 1.0)


# The contract and the grid


@every_law
@every_grid
@pytest.mark.parametrize(
    "options",
    [{}, {"learned": True}, {"channels": 3}, {"channels": 4, "axis": 0, "learned": True}, {"channels": 2, "axis": 3}],
    ids=["fixed", "learned", "channels", "learned weights", "last axis"],
)
def test_contract(law, grid, options):
    check_quantizer(make(grid=grid, law=law, **options), draws=150)


@pytest.mark.parametrize("bits", [1, 8])
@noisy_law
def test_contract_at_the_ends(law, bits):
    check_quantizer(make(bits, law=law), draws=150)


@given(
    bits=st.integers(1, 8),
    grid=st.sampled_from(get_args(Grid)),
    law=st.sampled_from(list(LAWS.values())),
    learned=st.booleans(),
    channels=st.sampled_from([None, 3]),
    high=st.floats(1e-3, 1e3),
    low=st.floats(-1e3, 1e-4),
    seed=st.integers(0, 99),
)
@settings(max_examples=120)
def test_every_value_is_a_level(bits, grid, law, learned, channels, high, low, seed):
    quantizer = Quantizer(bits, grid=grid, low=low, high=high, law=law, learned=learned, channels=channels)
    x = (uniform(seed, 4, 3, 40) * 3 - 1) * torch.tensor([1, 1e-2, 1e2])[:, None] * high
    x.requires_grad_()
    value = draw(quantizer, x, seed).detach()
    with rng.draw(seed):
        codes = quantizer.codes(x)
    levels = quantizer.levels()
    index = codes.long()
    expected = levels[index] if channels is None else levels[torch.arange(3)[:, None], index]
    assert torch.equal(value, expected)
    assert torch.equal(quantizer.decode(codes), value)
    assert levels.shape[-1] == 2**bits == levels.unique(dim=-1).shape[-1]


@every_grid
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_levels_span_the_range_evenly(grid, bits):
    levels = make(bits, grid=grid).double().levels()
    low = {"one-sided": 0.0, "two-sided": -0.4, "symmetric": -1.1}[grid]
    expected = torch.linspace(low, 1.1, 2**bits, dtype=torch.float64)
    assert torch.allclose(levels, expected, atol=1e-6)


def test_deterministic_rounding_takes_the_nearest_level():
    quantizer = make(4, law=Deterministic())
    x = torch.linspace(-1, 2, 999)
    nearest = quantizer.levels()[(x[:, None] - quantizer.levels()).abs().argmin(1)]
    assert (quantizer(x) != nearest).sum() <= 2  # ties within rounding
    assert torch.equal(quantizer(quantizer.levels()), quantizer.levels())


def test_infinite_inputs_end_at_the_ends():
    for law in LAWS.values():
        quantizer = make(law=law)
        x = torch.tensor([[-torch.inf], [torch.inf]], requires_grad=True)
        assert torch.equal(draw(quantizer, x)[:, 0], quantizer.levels()[[0, -1]])


# Closed forms


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased_with_known_variance(fraction):
    quantizer = Quantizer(3, high=7 * 0.3, law=StochasticRounding())
    n = 40_000
    x = torch.full((n,), 0.3 * (2 + fraction))
    value = quantizer(x, noise=uniform(1, n, 1)[:, 0]).double() / 0.3 - 2
    variance = fraction * (1 - fraction)
    assert abs(float(value.mean()) - fraction) < 5 * math.sqrt(variance / n) + 1e-6
    # A Bernoulli's fourth central moment gives the standard error of its sample variance.
    error = math.sqrt(max(variance * (1 - 3 * variance) - variance**2, 0) / n)
    assert abs(float(value.var()) - variance) < 5 * error + 5 / n


@every_law
@pytest.mark.parametrize("bits", [1, 3])
def test_probabilities_and_mean_follow_the_definition(law, bits):
    quantizer = make(bits, law=law).double()
    top, step = 2**bits - 1, float(quantizer.levels()[1] - quantizer.levels()[0])
    x = torch.linspace(-1, 2, 31, dtype=torch.float64)
    for value, p, mean in zip(x.tolist(), quantizer.probabilities(x), quantizer.mean(x), strict=True):
        z = (value - float(quantizer.levels()[0])) / step
        if isinstance(law, Deterministic):
            expected = [float(k == min(max(round(z), 0), top)) for k in range(top + 1)]
        else:
            below = [0.0, *(cdf(law, k + 0.5 - z) for k in range(top)), 1.0]
            expected = [b - a for a, b in pairwise(below)]
        assert p.tolist() == pytest.approx(expected, abs=1e-9)
        code = sum(k * q for k, q in enumerate(expected))
        assert float(mean) == pytest.approx(float(quantizer.levels()[0]) + step * code, abs=1e-7)


@noisy_law
@pytest.mark.parametrize("bits", [1, 3])
def test_mean_entropy_and_rate_follow_monte_carlo(law, bits):
    quantizer = make(bits, law=law).double()
    x = torch.tensor([-0.9, -0.35, 0.1, 0.37, 0.6, 1.08, 1.9], dtype=torch.float64)
    n = 20_000
    noise = uniform(2, n, len(x)).double()
    codes = quantizer.codes(x.expand(n, -1), noise=noise)
    value = quantizer.decode(codes)
    assert torch.all((value.mean(0) - quantizer.mean(x)).abs() <= 5 * value.std(0) / math.sqrt(n) + 2e-4)
    surprise = -quantizer.probabilities(x).expand(n, -1, -1).gather(-1, codes.long()[..., None])[..., 0].log2()
    error = 5 * surprise.std(0) / math.sqrt(n) + 2e-3
    assert torch.all((surprise.mean(0) - quantizer.entropy(x)).abs() <= error)
    measured = PlugIn()(torch.arange(len(x)).expand(n, -1).flatten(), codes.flatten().long())
    assert float(quantizer.rate(x)) == pytest.approx(measured.value, abs=5 * measured.standard_error + 1e-3)


def test_entropy_and_rate_of_extreme_cases():
    quantizer = Quantizer(2, high=3.0, law=StochasticRounding())
    assert quantizer.entropy(torch.tensor([1.0, 1.5, 9.0])).tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-6)
    assert float(quantizer.rate(torch.arange(4.0))) == pytest.approx(2.0, abs=1e-5)
    assert float(quantizer.rate(torch.full((5,), 1.5))) == pytest.approx(0.0, abs=1e-6)
    assert float(Quantizer(1, law=Deterministic()).rate(torch.tensor([0.1, 0.9, 0.8, 0.2]))) == pytest.approx(1.0)


@noisy_law
def test_entropy_and_rate_have_finite_gradients_where_probabilities_vanish(law):
    quantizer = Quantizer(8, law=law)
    x = torch.linspace(-1, 2, 40, requires_grad=True)
    assert quantizer.probabilities(x).min() == 0
    assert gradient(quantizer.entropy(x), x).isfinite().all()
    assert gradient(quantizer.rate(x), x).isfinite().all()


# Gradients


@smooth_law
@pytest.mark.parametrize("bits", [1, 3, 7])
def test_mean_has_exact_first_and_second_derivatives(law, bits):
    quantizer = make(bits, law=law, channels=2).double()
    x = torch.tensor([[-0.71, 0.134], [0.517, 1.043], [1.213, 0.871]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(quantizer.mean, x)
    assert gradgradcheck(quantizer.mean, x)


@smooth_law
@pytest.mark.parametrize("bits", [1, 4, 7])
def test_forward_carries_both_derivatives_of_the_mean(law, bits):
    quantizer = make(bits, law=law).double()
    x = torch.tensor([-0.71, 0.134, 0.517, 1.043, 1.213], dtype=torch.float64, requires_grad=True)
    noise = uniform(3, 5, 1)[:, 0].double()

    def first(x):
        return gradient(quantizer(x, noise=noise), x, create_graph=True)

    h = 1e-5
    with torch.no_grad():
        central = (quantizer.mean(x + h) - quantizer.mean(x - h)) / (2 * h)
    assert torch.allclose(first(x), central, atol=1e-6)
    assert gradcheck(first, x)
    assert torch.equal(first(x).detach(), gradient(quantizer(x, noise=noise), x))  # with a graph as without


@smooth_law
def test_the_penalty_of_an_input_gradient_reaches_the_weights(law):
    quantizer = make(4, law=law).double()
    x = uniform(4, 6, 3).double()
    noise = uniform(5, 6, 2).double()
    weight = torch.tensor([[0.3, -0.5, 0.8], [0.2, 0.9, -0.4]], dtype=torch.float64, requires_grad=True)

    def penalty(weight):
        leaf = x.clone().requires_grad_()
        out = quantizer(leaf @ weight.T, noise=noise)
        return torch.autograd.grad(out.sum(), leaf, create_graph=True)[0].square().sum()

    assert gradcheck(penalty, weight)


@smooth_law
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_single_precision_agrees_with_double(law, bits):
    x = torch.linspace(-1.2, 1.9, 501)
    noise = uniform(6, 501, 1)[:, 0]
    found = []
    for dtype in (torch.float32, torch.float64):
        quantizer, leaf = make(bits, law=law).to(dtype), x.to(dtype).requires_grad_()
        first = gradient(quantizer(leaf, noise=noise.to(dtype)), leaf, create_graph=True)
        found.append((first.detach().double(), gradient(first, leaf).double()))
    step = 1.5 / (2**bits - 1)
    assert torch.allclose(found[0][0], found[1][0], atol=2e-4)
    assert torch.allclose(found[0][1] * step, found[1][1] * step, atol=2e-3)


@pytest.mark.parametrize(("scale", "expected"), METHOD_SLOPES.items())
def test_smallest_slope_of_logistic_noise(scale, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMaskingWarning)
        law = Logistic(scale=scale)
    assert law.smallest_slope(scale) == pytest.approx(expected, abs=0.0051 if expected > 0.01 else 0.0005)
    quantizer = Quantizer(6, high=63.0, law=law).double()
    x = torch.linspace(28, 36, 801, dtype=torch.float64, requires_grad=True)
    slopes = gradient(quantizer.mean(x), x)
    assert float(slopes.min()) == pytest.approx(law.smallest_slope(scale), rel=1e-6)


def test_narrow_noise_is_warned_of():
    for law, width in ((Logistic, 0.1), (Logistic, 0.15), (Gaussian, 0.2)):
        with pytest.warns(GradientMaskingWarning, match=rf"scale={width}.* gradient-masking regime"):
            law(scale=width)
    with pytest.warns(GradientMaskingWarning, match="gradient-masking regime"):
        Logistic(floor=0.05, learned=True)  # the scale may fall to its floor
    for law in (Logistic(scale=0.2), Logistic(learned=True), Gaussian(learned=True)):
        assert law.smallest_slope(law.floor) > 0.5  # no warning, which would be an error


@noisy_law
def test_straight_through_is_one_inside_and_zero_outside(law):
    quantizer = make(law=law, backward="straight-through")
    x = torch.tensor([-0.9, -0.41, -0.39, 0.2, 1.09, 1.11, 3.0], requires_grad=True)
    assert gradient(draw(quantizer, x), x).tolist() == pytest.approx([0, 0, 1, 1, 1, 0, 0])


def test_deterministic_defaults_to_straight_through():
    x = torch.tensor([-0.9, 0.2, 3.0], requires_grad=True)
    assert gradient(make(law=Deterministic())(x), x).tolist() == pytest.approx([0, 1, 0])


def test_deterministic_rounding_may_have_the_gradient_of_a_smooth_mean():
    law = SmoothRounding(scale=0.3)
    quantizer, noisy = make(law=Deterministic(smooth_as=law)), make(law=law)
    x = torch.linspace(-0.8, 1.5, 47, requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y, make(law=Deterministic())(x))
    first, expected = (gradient(out, x, create_graph=True) for out in (y, noisy.mean(x)))
    assert torch.allclose(first, expected, atol=1e-5)
    assert torch.allclose(gradient(first, x), gradient(expected, x), atol=1e-3)
    with without_noise("mean"):
        assert torch.allclose(quantizer(x), noisy.mean(x), atol=1e-6)


def test_stochastic_rounding_shows_the_gradient_of_its_mean():
    quantizer = make(law=StochasticRounding())
    x = torch.linspace(-0.93, 1.57, 40, requires_grad=True)
    assert torch.allclose(gradient(draw(quantizer, x), x), gradient(quantizer.mean(x), x), atol=1e-6)


@noisy_law
def test_gumbel_keeps_the_draw_and_a_finite_gradient(law):
    x = torch.linspace(-2, 3, 60)[:, None].requires_grad_()
    relaxed = draw(make(law=law, backward="gumbel", temperature=0.3), x)
    assert torch.equal(relaxed.detach(), draw(make(law=law), x.detach()))
    assert gradient(relaxed, x).isfinite().all()


def test_gumbel_approaches_the_gradient_of_the_mean():
    quantizer = make(2, law=Logistic(), backward="gumbel", temperature=0.2).double()
    n = 20_000
    x = torch.tensor([-0.3, 0.1, 0.35, 0.8], dtype=torch.float64).expand(n, -1).clone().requires_grad_()
    drawn = gradient(draw(quantizer, x), x)
    exact = gradient(quantizer.mean(x[:1]), x)[0]
    error = 5 * drawn.std(0) / math.sqrt(n)
    assert error.max() < 0.15
    assert torch.all((drawn.mean(0) - exact).abs() < error + 0.1 * exact)  # the relaxation is biased by its temperature


# Surrogates


@every_law
def test_surrogates_change_gradients_and_never_values(law):
    quantizer = make(law=law)
    x = torch.linspace(-0.8, 1.5, 47, requires_grad=True)
    plain = draw(quantizer, x)
    shown: dict[Any, Any] = {None: gradient(plain, x, retain_graph=True)}
    for backward in ("mean", "straight-through", "gumbel"):
        with Surrogate(backward=backward)():
            y = draw(quantizer, x)
        assert torch.equal(y, plain)
        shown[backward] = gradient(y, x)
    assert torch.equal(shown[None], shown["mean" if law.stochastic else "straight-through"])
    if law.smooth:
        assert not torch.allclose(shown["mean"], shown["straight-through"], atol=1e-2)
        assert not torch.allclose(shown["mean"], shown["gumbel"], atol=1e-2)


@smooth_law
def test_a_wider_surrogate_shows_the_mean_of_wider_noise(law):
    wide = make(law=type(law)(scale=3 * law.scale))
    x = torch.linspace(-0.8, 1.5, 47, requires_grad=True)
    for quantizer in (make(law=law), make(law=dataclasses.replace(law, learned=True))):
        plain = draw(quantizer, x)
        with Surrogate(width=3.0)():
            y = draw(quantizer, x)
        assert torch.equal(y, plain)
        assert torch.allclose(gradient(y, x), gradient(wide.mean(x), x), atol=1e-4)


def test_surrogates_nest_and_end():
    quantizer, x = make(law=Logistic()), torch.tensor([[0.3]], requires_grad=True)
    with Surrogate(backward="gumbel")():
        with Surrogate(backward="straight-through")():
            assert gradient(draw(quantizer, x), x) == 1
        with pytest.raises(RuntimeError), Surrogate(width=2.0)():
            raise RuntimeError
        assert gradient(draw(quantizer, x), x) != 1
    assert torch.allclose(gradient(draw(quantizer, x), x), gradient(quantizer.mean(x), x))


def test_bad_surrogates_are_refused():
    with pytest.raises(InputError, match="expected a positive width and temperature"):
        Surrogate(width=0.0)
    with pytest.raises(InputError, match="expected a positive width and temperature"):
        Surrogate(temperature=-1.0)
    for temperature in (0.0, -0.5, math.nan):
        with pytest.raises(InputError, match="expected a positive width and temperature"):
            Quantizer(2, backward="gumbel", temperature=temperature)
    with pytest.raises((InputError, TypeError), match="backward"):  # the check of types comes first where it is on
        Surrogate(backward="none")  # pyright: ignore[reportArgumentType]


# Learned parameters


@pytest.mark.parametrize("law", [StochasticRounding(), Logistic(), Gaussian()], ids=["uniform", "logistic", "normal"])
@every_grid
@pytest.mark.parametrize("channels", [None, 2])
def test_learned_ranges_follow_the_mean_in_expectation(law, grid, channels):
    quantizer = make(2, grid=grid, law=law, learned=True, channels=channels).double()
    n = 4_000
    x = torch.tensor([[-0.55, 0.2], [0.33, 0.71], [1.02, 1.4]], dtype=torch.float64)
    rows = x.repeat(n, 1)
    weight = torch.tensor([[0.7, -1.0], [1.3, 0.5], [-0.6, 0.9]], dtype=torch.float64)
    parameters = list(quantizer.parameters())
    drawn = torch.autograd.grad((weight.repeat(n, 1) * draw(quantizer, rows)).sum(), parameters)
    exact = torch.autograd.grad((weight.repeat(n, 1) * quantizer.mean(rows)).sum(), parameters)
    with torch.no_grad():
        codes = torch.arange(quantizer.top + 1, dtype=torch.float64)
        p = quantizer.probabilities(x)
        variance = (p * codes**2).sum(-1) - (p * codes).sum(-1) ** 2
        groups = 1 if channels is None else channels
        factor = 1 / math.sqrt(rows.numel() // groups * quantizer.top)
        step = quantizer.log_step.exp()
        spread = (n * (weight**2 * variance).sum(0 if channels else (0, 1))).sqrt() * step * factor
    for name, a, b in zip(dict(quantizer.named_parameters()), drawn, exact, strict=True):
        error = 5 * spread if name == "log_step" else torch.zeros_like(a)
        assert torch.all((a - b).abs() <= error + 1e-9 * (1 + b.abs())), name
        assert torch.any(b != 0)


def test_the_gradient_of_a_learned_range_is_scaled_as_in_lsq():
    quantizer = Quantizer(3, grid="one-sided", high=2.0, law=Deterministic(), learned=True)
    x = torch.tensor([[0.4, 1.3, 5.0, -1.0]])
    (found,) = torch.autograd.grad(quantizer(x).sum(), quantizer.log_step)
    step = 2.0 / 7
    z = x / step
    inside = (z.round() - z)[(z > 0) & (z < 7)].sum() + 7  # LSQ, equation 3: the clipped element counts its level
    assert float(found) == pytest.approx(float(inside * step) / math.sqrt(4 * 7), rel=1e-4)


@pytest.mark.parametrize("law", [Logistic(learned=True), Gaussian(learned=True)], ids=["logistic", "gaussian"])
def test_a_learned_scale_stays_between_its_floor_and_the_widest(law):
    quantizer = make(4, law=law)
    assert quantizer.scale().item() == pytest.approx(law.scale)
    x = torch.linspace(-0.8, 1.5, 47)
    optimizer = torch.optim.SGD([quantizer.raw_scale], lr=1.0)
    for hostile in (1e3, 1e30, -1e3, -1e38, 1e38):
        quantizer.raw_scale.grad = torch.tensor(hostile)
        optimizer.step()
        assert law.floor <= quantizer.scale().item() <= 16.0001
        value = draw(quantizer, x)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), quantizer.raw_scale)[0].isfinite()


def test_a_learned_scale_gets_the_gradient_of_the_mean():
    quantizer = make(3, law=Logistic(learned=True)).double()
    x = torch.linspace(-0.8, 1.5, 23, dtype=torch.float64)
    (found,) = torch.autograd.grad(draw(quantizer, x).square().sum(), quantizer.raw_scale, retain_graph=True)
    value = draw(quantizer, x).detach()
    h = 1e-5
    with torch.no_grad():
        raw = quantizer.raw_scale.clone()
        means = [quantizer.raw_scale.copy_(raw + sign * h) and quantizer.mean(x) for sign in (1, -1)]
    assert float(found) == pytest.approx(float((2 * value * (means[0] - means[1]) / (2 * h)).sum()), rel=1e-5)


# Draws


@given(order=st.permutations(range(6)), cut=st.integers(1, 5), law=st.sampled_from(list(NOISY.values())))
@settings(max_examples=30)
def test_draws_do_not_depend_on_the_batch(order, cut, law):
    quantizer = make(law=law)
    x, index = uniform(7, 6, 5) * 2 - 0.5, torch.tensor(order)
    whole = draw(quantizer, x, 3)
    parts = [draw(quantizer, x[part], 3, part) for part in (index[:cut], index[cut:])]
    assert torch.equal(torch.cat(parts), whole[index])


@noisy_law
def test_addresses_and_seeds_separate_draws(law):
    x = torch.full((50, 40), 0.31)
    first, second = make(law=law), make(law=law)
    second.address = "layer2"
    values = [draw(first, x, 0), draw(first, x, 1), draw(second, x, 0)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        pair = torch.stack([values[i].flatten(), values[j].flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / math.sqrt(2_000)


@noisy_law
def test_draws_resume_after_pickle_and_copy(law):
    quantizer, x = make(law=law, learned=True), uniform(8, 4, 9)
    quantizer.address = "conv1"
    fresh = make(law=law, learned=True)
    fresh.load_state_dict(quantizer.state_dict())
    fresh.address = "conv1"
    for twin in (pickle.loads(pickle.dumps(quantizer)), copy.deepcopy(quantizer), fresh):
        assert torch.equal(draw(twin, x, 5), draw(quantizer, x, 5))


@noisy_law
def test_a_draw_is_the_dither_of_its_address(law):
    quantizer, x = make(5, law=law), uniform(10, 300, 200) * 2 - 0.6
    quantizer.address = "conv1"
    with rng.draw(4):
        value, dithered = quantizer(x), quantizer(x, noise=rng.uniform_like(x, "conv1"))
    assert (value != dithered).double().mean() < 1e-4  # but for the last place of a logarithm


def test_outside_of_a_draw_noise_is_fresh():
    quantizer, x = make(), torch.full((9, 9), 0.3)
    assert not torch.equal(quantizer(x), quantizer(x))


@every_law
def test_half_precision_rounds_the_same_levels(law):
    quantizer = make(law=law)
    for dtype in (torch.float16, torch.bfloat16):
        x = (uniform(9, 20, 30) * 2 - 0.6).to(dtype)
        value = draw(quantizer, x)
        assert value.dtype == dtype == quantizer.mean(x).dtype
        with rng.draw(0):
            assert torch.equal(quantizer.decode(quantizer.codes(x)).to(dtype), value)


@pytest.mark.parametrize(
    ("law", "passes"), [(Deterministic(smooth_as=SmoothRounding(scale=0.4)), True), (SmoothRounding(scale=0.4), False)]
)
def test_only_without_noise_a_signal_passes_whose_gradient_vanishes(law, passes):
    """What lets a training by input gradients cheat where the gradient is a surrogate (docs/research/noise.md)."""
    signal = torch.linspace(-1, 1, 1000).view(-1, 1).requires_grad_()
    with rng.draw(0, torch.arange(1000)):
        y = Quantizer(4, grid="two-sided", low=-1.0, high=1.0, law=law)(1e-3 * signal)
    spread = y.detach().std()  # by which a norm layer would divide
    (slope,) = torch.autograd.grad((y / spread).sum(), signal)
    assert float(slope.abs().max()) < 0.02
    agreement = torch.corrcoef(torch.stack([y.detach().flatten(), signal.detach().sign().flatten()]))[0, 1]
    assert (float(agreement) > 0.99) if passes else (abs(float(agreement)) < 0.1)


# Ranges and bad input


def test_a_fitted_range_has_the_least_error():
    x = torch.randn(4_000)
    for grid in get_args(Grid):
        quantizer = Quantizer(3, grid=grid, law=Deterministic(), learned=True)
        quantizer.fit_range(x)
        target = x.clamp(min=0) if grid == "one-sided" else x
        error = (quantizer(x) - target).square().mean()
        best = quantizer.log_step.item()
        for shift in (-0.3, -0.1, 0.1, 0.3):
            with torch.no_grad():
                quantizer.log_step.fill_(best + shift)
            assert error < (quantizer(x) - target).square().mean()


def test_ranges_are_fitted_by_channel():
    scales = torch.tensor([0.01, 1.0, 50.0])
    x = torch.randn(3, 500) * scales[:, None]
    quantizer = Quantizer(4, grid="symmetric", channels=3, axis=0)
    quantizer.fit_range(x)
    for channel in range(3):
        alone = Quantizer(4, grid="symmetric")
        alone.fit_range(x[channel])
        assert torch.equal(quantizer.levels()[channel], alone.levels())


@pytest.mark.parametrize("learned", [False, True])
def test_a_dead_unit_keeps_its_range(learned):
    quantizer = Quantizer(4, high=3.0, learned=learned)
    quantizer.fit_range(-torch.rand(50))
    assert quantizer.levels()[-1] == pytest.approx(3.0)
    zeros = Quantizer(4, grid="symmetric", learned=learned)
    zeros.fit_range(torch.zeros(50))
    assert zeros.levels().abs().max() < 1e-6  # zero weights stay zero


@pytest.mark.parametrize("x", [torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf]), torch.zeros(0)])
def test_ranges_of_no_finite_values_are_refused(x):
    with pytest.raises(InputError, match="expected finite values to fit a range to"):
        Quantizer(4).fit_range(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, r"an integer in \[1, 8\], got 0"),
        ({"bits": 9}, r"an integer in \[1, 8\], got 9"),
        ({"bits": True}, r"an integer in \[1, 8\], got True"),
        ({"bits": 2, "high": 0.0}, "0.0 < high"),
        ({"bits": 2, "high": math.inf}, "finite"),
        ({"bits": 2, "grid": "two-sided", "low": 1.0}, "1.0 < high"),
        ({"bits": 2, "channels": 0}, "at least one channel"),
        ({"bits": 2, "law": Deterministic(), "backward": "mean"}, "straight-through for a deterministic"),
        ({"bits": 2, "law": Deterministic(), "backward": "gumbel"}, "straight-through for a deterministic"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Quantizer(**options)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": 16.0}, {"scale": 0.3, "floor": 0.3, "learned": True}])
@pytest.mark.parametrize("law", [Logistic, Gaussian])
def test_bad_laws_are_refused(law, options):
    with pytest.raises(InputError, match="expected a"):
        law(**options)


@pytest.mark.parametrize(
    "law",
    [Logistic(), Gaussian(), SmoothRounding(), StochasticRounding(), Deterministic(smooth_as=SmoothRounding())],
    ids=str,
)
def test_the_mean_twin_has_the_value_and_the_derivatives_of_the_mean_over_thresholds(law):
    x = torch.linspace(-1.03, 4.01, 41, dtype=torch.float64, requires_grad=True)
    quantizer = Quantizer(4, high=3.0, law=law).double()
    smooth = law.smooth_as if isinstance(law, Deterministic) else law
    with without_noise("mean"):
        value = quantizer(x)
    z = x / 3.0 * 15
    expected = sum(smooth.cdf(z - k - 0.5, getattr(smooth, "scale", 0.0)) for k in range(15)) / 15 * 3.0
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    slopes = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (value, expected)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=0)
    if not isinstance(smooth, StochasticRounding):
        curvatures = [torch.autograd.grad(slope.sum(), x)[0] for slope in slopes]
        torch.testing.assert_close(*curvatures, atol=1e-5, rtol=0)


# The concrete relaxation


@smooth_law
@pytest.mark.parametrize("top", [1, 3, 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known", [True, False])
def test_the_slope_of_the_relaxation_is_its_derivative(law, top, dtype, known, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 100)  # several blocks
    monkeypatch.setattr(concrete, "_BLOCK", 300)
    if not known:
        monkeypatch.setattr(concrete, "SMOOTH", {})  # as for a law of a user's own
    z = (rng.uniform(3, torch.arange(6), 50).to(dtype) * (top + 4) - 2).view(6, 5, 10).requires_grad_()
    u = rng.uniform(4, torch.arange(6), 50).to(dtype).view(6, 5, 10)
    code = (z.detach() + law.sample(u, law.scale)).round().clamp(0, top)
    for temperature in (0.1, 0.5, 1.0):
        relaxation = concrete.Concrete(law=law, scale=law.scale, top=top, temperature=temperature)
        expected = gradient(relaxation.relaxed(code, z, torch.arange(6)), z)
        found = gradient(relaxation.attach(code, z, torch.arange(6)), z)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", [0.002, 0.00625, 0.0063, 0.02])
def test_the_relaxation_bears_narrow_noise(scale):
    law, keys = SmoothRounding(scale=scale), torch.arange(40)
    z = torch.linspace(-1, 4, 40)[:, None].requires_grad_()
    code = z.detach().round().clamp(0, 3)
    relaxation = concrete.Concrete(law=law, scale=law.scale, top=3, temperature=0.5)
    expected = gradient(relaxation.relaxed(code.double(), z.double(), keys), z)
    found = gradient(relaxation.attach(code, z, keys), z)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert found.abs().max() > 0.5


def test_the_relaxation_has_second_derivatives():
    relaxation = concrete.Concrete(law=Logistic(), scale=0.25, top=3, temperature=0.5)
    z = torch.linspace(-1, 4, 12, dtype=torch.float64)[:, None].requires_grad_()
    code, keys = z.detach().round().clamp(0, 3), torch.arange(12)

    def derivatives(function):
        (first,) = torch.autograd.grad(function(code, z, keys).sum(), z, create_graph=True)
        return first.detach(), gradient(first.square(), z)

    for found, expected in zip(derivatives(relaxation.attach), derivatives(relaxation.relaxed), strict=True):
        torch.testing.assert_close(found, expected)
        assert expected.abs().max() > 0.1


@smooth_law
def test_probabilities_are_exact_in_both_tails(law):
    far = torch.tensor([-1.5, 16.5])
    exact = concrete.probabilities(far.double(), 15, law, law.scale)
    found = concrete.probabilities(far, 15, law, law.scale)
    seen = exact > 1e-30
    assert seen.sum() > 4
    torch.testing.assert_close(found[seen].double(), exact[seen], rtol=1e-2, atol=0)


@pytest.mark.long
def test_a_gumbel_gradient_takes_little_more_memory_than_that_of_the_mean():
    code = """
import resource, torch
from bitquorum import rng
from bitquorum.quantizers import Quantizer, SmoothRounding, Surrogate
quantizer, x = Quantizer(4, law=SmoothRounding()), torch.zeros(50, 40_000).requires_grad_()
peaks = []
for backward in ("mean", "gumbel"):
    with Surrogate(backward=backward)(), rng.draw(0):
        torch.autograd.grad(quantizer(x).sum(), x)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80_000  # KiB; one number for each code of each element is 125,000
