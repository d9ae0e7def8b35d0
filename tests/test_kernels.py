"""Check the kernels against independent arithmetic, and compiled code against plain code."""

import inspect
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from bitquorum import kernels, rng
from bitquorum.conversion import Policy
from bitquorum.interface import GradientMaskingWarning, InputError, NoEffectWarning
from bitquorum.kernels import choice, convolution, layout, mean, noise, polynomial
from bitquorum.kernels.convolution import product_gradient
from bitquorum.layers import QuantLayer
from bitquorum.quantizers import (
    Deterministic,
    Gaussian,
    Logistic,
    Quantizer,
    SmoothRounding,
    StochasticRounding,
    Surrogate,
)
from bitquorum.quantizers import mean as sums
from bitquorum.quantizers.twin import twin as without_noise
from bitquorum.zoo import BatchNorm

LAWS = {
    "logistic": Logistic(),
    "gaussian": Gaussian(),
    "smooth-rounding": SmoothRounding(),
    "uniform": StochasticRounding(),
}
SMOOTH = {"logistic": (17.0, 0.25), "gaussian": (5.5, 0.45), "smooth-rounding": (17.0, 0.193)}
LAWS_SLOW = ("logistic", "gaussian")  # each takes kernels of its own
needs_compiler = pytest.mark.skipif(not kernels.compiler_available(), reason="no C++ compiler, or no Python headers")


@pytest.fixture(autouse=True)
def _fresh():
    """Leave the choice, the list of failed devices and the warnings given as they were."""
    before, failed = kernels.mode(), choice._State.failed
    yield
    kernels.use(before)
    choice._State.failed = failed
    for cached in (choice._warn_once, kernels.compiler_available):
        cached.cache_clear()


@pytest.fixture
def compiled():
    with kernels.use("compiled"):
        yield
    assert not choice._State.failed, "the compiler failed"


def keys_of(rows: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=torch.Generator().manual_seed(seed))


def values(*shape: int, top: int = 15, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (top + 3) - 1.5


def exact(z: torch.Tensor, law, top: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return slope and curvature by float64 sums over all thresholds, written anew."""
    y = (z.double()[..., None] - torch.arange(top).double() - 0.5) / scale
    if law == "logistic":
        density = torch.sigmoid(y) * torch.sigmoid(-y)
        return density.sum(-1) / scale, -(density * (y / 2).tanh()).sum(-1) / scale**2
    if law == "smooth-rounding":
        low = -y.abs()
        s, t = torch.sigmoid(low + 0.5 / scale), torch.sigmoid(low - 0.5 / scale)
        return (s - t).sum(-1), -((s * (1 - s) - t * (1 - t)) * y.sign()).sum(-1) / scale
    density = torch.exp(-y.square() / 2) / (2 * torch.pi) ** 0.5
    return density.sum(-1) / scale, -(density * y).sum(-1) / scale**2


def mixed(value: int) -> int:
    for shift, multiplier in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 1)):
        value = (value ^ (value >> shift)) * multiplier % 2**32
    return value


def number(key: int, element: int) -> float:
    """Return a noise number by Python's unbounded integers."""
    low, high = key % 2**32, key // 2**32 % 2**32
    return ((mixed(mixed((element + low) % 2**32) ^ high) >> 9) + 0.5) / 2**23


# Noise and draws


@given(key=st.integers(-(2**63), 2**63 - 1), element=st.integers(0, 300))
def test_noise_is_the_documented_integer_hash(key, element):
    assert kernels.uniform(torch.tensor([key]), element + 1)[0, -1].item() == number(key, element)


def test_noise_does_not_depend_on_blocks(monkeypatch):
    keys = keys_of(5)
    whole = kernels.uniform(keys, 1000)
    monkeypatch.setattr(noise, "_BLOCK", 64)
    assert torch.equal(kernels.uniform(keys, 1000), whole)
    assert torch.equal(kernels.uniform(keys[::2], 1000), whole[::2])
    assert whole[3, 999].item() == number(int(keys[3]), 999)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 37), (6, 3, 8, 9), (1, 5), (0, 5), (4, 0)])
def test_draw_follows_its_law(law, dtype, shape, monkeypatch):
    z, keys = values(*shape).to(dtype), keys_of(shape[0])
    scale = getattr(LAWS[law], "scale", 1.0)
    u = kernels.uniform(keys, z.shape[1:].numel()).view_as(z).to(dtype)
    expected = (LAWS[law].sample(u, scale) + z).round().clamp(0, 15)
    assert torch.equal(kernels.draw(keys, z, law=law, top=15, scale=scale), expected)
    monkeypatch.setattr(noise, "_BLOCK", 16)
    tensor_scale = torch.tensor(scale, dtype=dtype)
    assert torch.equal(kernels.draw(keys, z, law=law, top=15, scale=tensor_scale), expected)


def test_the_far_end_of_a_wide_smooth_clip_changes_no_bit_of_the_slope(monkeypatch):
    z = torch.linspace(-5, 20, 20_001)
    chosen = {"law": "smooth-rounding", "top": 15, "scale": 15 / 36.1}
    near = kernels.slope_and_curvature(z, **chosen)
    monkeypatch.setitem(mean._REACH, "smooth-rounding", 1e9)
    both = kernels.slope_and_curvature(z, **chosen)
    assert torch.equal(near[0], both[0])
    assert (near[1] - both[1]).abs().max() < 2e-8 / chosen["scale"]


def permuted(z: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors equal to `z` in other memory layouts: dense, with gaps, and with the batch innermost."""
    gaps = torch.zeros(*z.shape, 2)
    gaps[..., 0] = z
    return [
        z.to(memory_format=torch.channels_last),
        z.transpose(1, 3).contiguous().transpose(1, 3),
        gaps[..., 0],
        z.movedim(0, -1).contiguous().movedim(-1, 0),
    ]


def test_layout_changes_no_result():
    z, keys = values(4, 3, 5, 7), keys_of(4)
    codes = kernels.draw(keys, z, law="logistic", top=15, scale=0.25)
    slope = kernels.slope(z, law="logistic", top=15, scale=0.25)
    for other in permuted(z):
        assert torch.equal(kernels.draw(keys, other, law="logistic", top=15, scale=0.25), codes)
        assert torch.equal(kernels.slope(other, law="logistic", top=15, scale=0.25), slope)


def test_dense_layouts_are_kept_and_not_copied():
    z = values(4, 3, 5, 7).to(memory_format=torch.channels_last)
    assert layout.flatten(z, 1).data_ptr() == z.data_ptr() == layout.flatten(z).data_ptr()
    assert kernels.draw(keys_of(4), z, law="logistic", top=15, scale=0.25).stride() == z.stride()
    for result in kernels.slope_and_curvature(z, law="gaussian", top=15, scale=0.45):
        assert result.stride() == z.stride()


def test_a_copy_in_another_layout_lies_element_by_element_beside_it():
    dense = values(4, 3, 5, 7)
    for like in (*permuted(dense), dense[:, :1].expand(4, 3, 5, 7), dense[:1].expand(4, 3, 5, 7), dense[:, :, :1, :1]):
        x = torch.arange(like.numel()).view(like.shape)
        beside = layout.flatten(layout.like_layout(x, like))
        assert torch.equal(layout.unflatten(beside, like), x)


def test_results_carry_no_graph_and_leave_the_input_alone():
    z = values(4, 9).requires_grad_()
    before = z.detach().clone()
    results = [
        kernels.draw(keys_of(4), z, law="gaussian", top=15, scale=0.45),
        kernels.slope(z, law="logistic", top=15, scale=0.25),
        *kernels.slope_and_curvature(z, law="gaussian", top=255, scale=0.45),
    ]
    assert not any(result.requires_grad for result in results)
    assert torch.equal(z.detach(), before)


def test_normal_quantile_is_that_of_torch():
    u = torch.cat([kernels.uniform(keys_of(1), 10**5)[0], torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])])
    expected = torch.special.ndtri(u.double())
    error = (noise._probit(u).double() - expected).abs()
    assert float((error / (1 + expected.abs())).max()) < 1e-6


# Slope and curvature


@pytest.mark.parametrize("law", SMOOTH)
@pytest.mark.parametrize("top", [1, 3, 7, 15, 31, 255])
@pytest.mark.parametrize("width", [0.4, 1.0, 4.0])
def test_slope_and_curvature_equal_sums_over_all_thresholds(law, top, width):
    scale = SMOOTH[law][1] * width
    z = torch.linspace(-6, top + 6, 4001)
    first, second = kernels.slope_and_curvature(z, law=law, top=top, scale=scale)
    expected = exact(z, law, top, scale)
    # The argument of the exponential is rounded: eps times its largest value, times the derivative.
    tolerance = 6e-8 * max(top, 26 * scale) / scale
    torch.testing.assert_close(first.double(), expected[0], rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(second.double(), expected[1], rtol=tolerance, atol=tolerance / scale**2)
    torch.testing.assert_close(kernels.slope(z, law=law, top=top, scale=scale), first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", SMOOTH)
@pytest.mark.parametrize("top", [1, 15, 255])
def test_tails_are_exact_to_rounding(law, top):
    reach, scale = SMOOTH[law]
    away = torch.linspace(0, 0.6 * reach * scale, 301)
    for z in (-away, top + away):
        results = kernels.slope_and_curvature(z, law=law, top=top, scale=scale)
        for result, expected in zip(results, exact(z, law, top, scale), strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=5e-5, atol=2e-12)


@pytest.mark.parametrize("law", SMOOTH)
@pytest.mark.parametrize("top", [2, 15, 255])
def test_slope_is_even_and_curvature_odd_about_the_centre(law, top):
    z = torch.arange(0, top + 0.125, 0.125)
    first, second = kernels.slope_and_curvature(z, law=law, top=top, scale=0.5)
    assert torch.equal(first, first.flip(0))
    assert torch.equal(second, -second.flip(0))


@pytest.mark.parametrize("law", SMOOTH)
@pytest.mark.parametrize("top", [1, 15, 255])
def test_infinite_and_missing_values(law, top):
    z = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, float("nan")])
    for result in kernels.slope_and_curvature(z, law=law, top=top, scale=0.25):
        assert bool((result[:4].abs() < 1e-9).all())
        assert bool(result[4].isnan())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_odd_shapes(shape):
    z = torch.ones(shape)
    assert kernels.slope(z, law="logistic", top=3, scale=0.25).shape == shape
    assert [r.shape for r in kernels.slope_and_curvature(z, law="gaussian", top=3, scale=0.45)] == [shape] * 2


def test_blocks_change_no_result(monkeypatch):
    z = values(7, 31)
    whole = kernels.slope_and_curvature(z, law="logistic", top=31, scale=0.25)
    monkeypatch.setattr(layout, "BLOCK", 16)
    for result, expected in zip(kernels.slope_and_curvature(z, law="logistic", top=31, scale=0.25), whole, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("scale", [0.004, 0.02, 0.05, 0.08, 0.2, 3.0])
@pytest.mark.parametrize("top", [1, 7, 15, 255])
def test_every_noise_scale_gives_a_finite_slope(scale, top):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMaskingWarning)
        law = Logistic(scale=scale)
    z = torch.linspace(-3, top + 3, 2001)
    expected = exact(z, "logistic", top, scale)
    for result, known in zip(sums.slope_and_curvature(z, top, law, scale), expected, strict=True):
        assert bool(result.isfinite().all())
        scaled = result.double() - known
        assert float(scaled.abs().max()) < 1e-6 * max(top, 1 / scale) * float(known.abs().max().clamp(min=1))


def test_narrow_logistic_noise_is_refused():
    assert kernels.fits("logistic", 255, 0.25)
    assert not kernels.fits("logistic", 3, 0.005)
    assert not kernels.fits("logistic", 255, 1e-4)  # nor does a table overflow
    assert kernels.fits("gaussian", 3, 0.01)
    with pytest.raises(InputError, match=r"fits float32, got scale=0.005 on 4 levels"):
        kernels.slope(torch.zeros(3), law="logistic", top=3, scale=0.005)


# The choice


def test_plain_code_is_the_default():
    assert kernels.mode() == "eager"


@needs_compiler
def test_use_holds_from_the_call_on_and_restores_after_a_block():
    kernels.use("compiled")
    assert kernels.mode() == "compiled"
    with kernels.use("eager"):
        assert kernels.mode() == "eager"
    assert kernels.mode() == "compiled"
    with pytest.raises(KeyError), kernels.use("eager"):
        raise KeyError
    assert kernels.mode() == "compiled"


def test_unknown_choice_is_an_error():
    with pytest.raises(InputError, match="expected kernels among eager, compiled, got 'fast'"):
        inspect.unwrap(kernels.use)("fast")  # below the type checks of the tests


def test_without_a_compiler_it_warns_once_and_stays_plain(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    kernels.compiler_available.cache_clear()
    assert not kernels.compiler_available()
    with pytest.warns(NoEffectWarning, match=r"no C\+\+ compiler was found"), kernels.use("compiled"):
        assert kernels.mode() == "eager"
    kernels.use("compiled")  # a second warning would be an error
    assert kernels.mode() == "eager"


def test_a_compiler_named_in_the_environment_must_exist(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    kernels.compiler_available.cache_clear()
    assert not kernels.compiler_available()
    assert not kernels.compiler_available("meta")


def test_a_failing_compiler_leaves_the_results_right(monkeypatch):
    def fail(*tensors):
        raise TorchDynamoException("no space left")

    monkeypatch.setattr(choice, "compiler_available", lambda device="cpu": device == "cpu")
    monkeypatch.setattr(choice, "_compile", lambda kernel, exact, constants: fail)
    z, keys = values(4, 9), keys_of(4)
    expected = kernels.draw(keys, z, law="logistic", top=15, scale=0.25)
    kernels.use("compiled")
    with pytest.warns(NoEffectWarning, match=r"the compiler failed \(no space left\)"):
        assert torch.equal(kernels.draw(keys, z, law="logistic", top=15, scale=0.25), expected)
    kernels.slope(z, law="logistic", top=15, scale=0.25)  # neither tries nor warns again


def test_a_compiler_that_fails_in_the_backward_pass_leaves_the_gradients_right(monkeypatch):
    """Forward kernels were compiled, then the disk was full; all kernels here run plainly, as if compiled."""
    failing = False

    def run(kernel, exact, constants):
        def kernel_or_failure(*tensors):
            if failing:
                raise TorchDynamoException("no space left")
            return kernel(*tensors, **dict(constants))

        return kernel_or_failure

    monkeypatch.setattr(choice, "compiler_available", lambda device="cpu": device == "cpu")
    monkeypatch.setattr(choice, "_compile", run)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), BatchNorm(3), nn.GELU(), nn.Conv2d(3, 2, 3))
    policy = Policy(weight_bits=4, activation_bits=4, weight_law=Deterministic(), activation_law=SmoothRounding())
    quantized = policy(network).to(memory_format=torch.channels_last)
    x = torch.rand(4, 2, 8, 8).contiguous(memory_format=torch.channels_last)

    def gradients(fails: bool) -> list[torch.Tensor]:
        nonlocal failing
        failing, choice._State.failed = False, frozenset()
        leaf = x.clone().requires_grad_()
        with kernels.use("compiled"), rng.draw(1):
            loss = quantized(leaf).square().sum()
            failing = fails
            (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
            first.abs().sum().backward()
        found = [parameter.grad for parameter in quantized.parameters() if parameter.grad is not None]
        quantized.zero_grad(set_to_none=True)
        return [first.detach(), *found]

    expected = gradients(fails=False)
    assert len(expected) > 5
    with pytest.warns(NoEffectWarning, match="the compiler failed"):
        found = gradients(fails=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)  # running means moved, by which sums are shifted


def test_compiled_code_takes_float32_on_known_devices_alone(monkeypatch):
    monkeypatch.setattr(choice, "compiler_available", lambda device="cpu": device == "cpu")
    kernels.use("compiled")
    assert choice.applies(torch.zeros(2))
    assert not choice.applies(torch.zeros(2, dtype=torch.float64))
    assert not choice.applies(torch.zeros(2, dtype=torch.bfloat16))
    assert not choice.applies(torch.zeros(0))
    assert not choice.applies(torch.zeros(2, device="meta"))
    kernels.use("eager")
    assert not choice.applies(torch.zeros(2))


# Compiled code: three small kernels


@pytest.mark.long
@needs_compiler
def test_compiled_noise_has_the_same_bits(compiled):
    halves = noise.key_halves(keys_of(7))
    for count in (2, 16, 1003):
        counter = torch.arange(count, dtype=torch.int32)
        assert torch.equal(choice.call(noise.uniform_of, halves, counter), noise.uniform_of(halves, counter))


@pytest.mark.long
@needs_compiler
def test_compiled_draw_equals_plain_draw(compiled):
    z, keys = values(64, 3, 41, 41, top=3), keys_of(64)
    arguments = {"law": "logistic", "top": 3, "scale": 0.25}
    codes = kernels.draw(keys, z, **arguments)
    with kernels.use("eager"):
        plain = kernels.draw(keys, z, **arguments)
    assert float((codes != plain).float().mean()) < 1e-5
    assert torch.equal(kernels.draw(keys, z, **arguments), codes)
    channels_last = z.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.draw(keys, channels_last, **arguments), codes)
    # Another range, scale, batch or layout takes the same kernel; float64 takes the plain one.
    graphs = counters["stats"]["unique_graphs"]
    wider = kernels.draw(keys, 5 * z, law="logistic", top=15, scale=torch.tensor(0.5))
    double = kernels.draw(keys, 5 * z.double(), law="logistic", top=15, scale=0.5)
    assert float((wider != double).float().mean()) < 1e-5
    assert double.dtype == torch.float64
    for other in (z[:1], z[:9, :, ::2], channels_last[3:5]):
        kernels.draw(keys[: len(other)], other, **arguments)
    assert counters["stats"]["unique_graphs"] == graphs


@needs_compiler
def test_compiled_draw_does_not_depend_on_the_batch(compiled):
    z, keys = values(33, 67), keys_of(33)
    arguments = {"law": "logistic", "top": 15, "scale": 0.25}
    codes = kernels.draw(keys, z, **arguments)
    shuffled = torch.randperm(33)
    assert torch.equal(kernels.draw(keys[shuffled], z[shuffled], **arguments), codes[shuffled])
    assert torch.equal(kernels.draw(keys[5:7], z[5:7], **arguments), codes[5:7])
    assert torch.equal(kernels.draw(keys[8:9], z[8:9], **arguments), codes[8:9])
    for count in (2, 15, 16, 17):
        assert torch.equal(kernels.draw(keys, z[:, :count], **arguments), codes[:, :count])


@pytest.mark.long
@needs_compiler
def test_compiled_quantizer_equals_plain_quantizer(compiled):
    quantizer = Quantizer(2, high=3.0)
    results = []
    for mode in ("compiled", "eager"):
        x = values(19, 2, 5, 7, top=3).requires_grad_()
        with kernels.use(mode), rng.draw([4, 5]):
            out = quantizer(torch.cat([x, x]))
            (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(gradient.square().sum(), x)
        results.append((out.detach(), gradient.detach(), second))
    (out, gradient, second), plain = results
    assert torch.equal(out, plain[0])
    torch.testing.assert_close(gradient, plain[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, plain[2], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("law", ["smooth-rounding", *(pytest.param(law, marks=pytest.mark.slow) for law in LAWS_SLOW)])
def test_compiled_slope_of_a_relaxation_equals_the_plain_one(compiled, law, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK", 200)
    scale = SMOOTH[law][1]
    for shape, top in (((7, 3, 8, 9), 15), ((5, 40), 1), ((1, 30), 3)):
        z, keys = values(*shape, top=top), keys_of(shape[0])
        for x in (z, z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z):
            code = kernels.draw(keys, x, law=law, top=top, scale=scale)
            settings = {"law": law, "top": top, "scale": scale, "temperature": 0.5}
            found = kernels.relaxed_slope(code, x, keys, **settings)
            with kernels.use("eager"):
                expected = kernels.relaxed_slope(code, x, keys, **settings)
                same = kernels.relaxed_slope(code.contiguous(), z, keys, **settings)
            assert found.stride() == x.stride()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(same, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("law", SMOOTH)
@pytest.mark.parametrize("top", [1, 15, 255])
def test_every_compiled_kernel_equals_its_plain_twin(compiled, law, top):
    z, keys, scale = values(50, 3, 41, 41, top=top), keys_of(50), SMOOTH[law][1]
    compiled_results = [
        kernels.slope(z, law=law, top=top, scale=scale),
        *kernels.slope_and_curvature(z, law=law, top=top, scale=scale),
    ]
    codes = kernels.draw(keys, z, law=law, top=top, scale=scale)
    with kernels.use("eager"):
        plain = kernels.draw(keys, z, law=law, top=top, scale=scale)
        plain_results = [
            kernels.slope(z, law=law, top=top, scale=scale),
            *kernels.slope_and_curvature(z, law=law, top=top, scale=scale),
        ]
    assert float((codes != plain).float().mean()) < 1e-5
    for result, expected in zip(compiled_results, plain_results, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=2e-5)


# One pass for the quantizer, for batch norm and for the second derivatives of convolutions


def derivatives(function, x, *parameters, within=nullcontext):
    """Return a result, and the gradients of a loss that holds the result and the gradient of x, taken `within`."""
    out = function(x)
    slopes = torch.linspace(0.5, 1.5, out.numel()).view_as(out)
    with within():
        (first,) = torch.autograd.grad((out.float().square() * slopes).sum(), x, create_graph=True)
    loss = first.float().abs().sum() + (out.float() * slopes).sum()
    return [out.detach(), first.detach(), *torch.autograd.grad(loss, (x, *parameters))]


def close(results, expected, rtol=1e-4):
    for result, known in zip(results, expected, strict=True):
        assert result.dtype == known.dtype
        torch.testing.assert_close(result, known, rtol=rtol, atol=rtol * float(known.abs().max()))


@needs_compiler
@pytest.mark.parametrize(
    ("function", "reference", "low", "high", "error"),
    [
        (polynomial.logit, torch.logit, 2.0**-24, 1 - 2.0**-24, 3),
        (polynomial.exp2, torch.exp2, -90.0, 90.0, 3),
        (polynomial.cosine, lambda turns: torch.cos(2 * math.pi * turns), -0.5, 0.5, 8),
        (polynomial.sine, lambda turns: torch.sin(2 * math.pi * turns), -0.5, 0.5, 8),
    ],
)
def test_elementary_functions_of_compiled_code(compiled, function, reference, low, high, error):
    x = torch.linspace(low, high, 100_003)
    if function is polynomial.logit:
        x = ((x * 2**23).floor() + 0.5) * 2.0**-23  # as `uniform` makes them
    known, found = reference(x.double()), choice.call(function, x)
    assert not torch.equal(found, function(x))  # compiled, another one
    allowed = error * 2.0**-24 * (known.abs() if function in (polynomial.logit, polynomial.exp2) else 1)
    assert bool(((found - known).abs() <= allowed).all())
    torch.testing.assert_close(function(x), found, rtol=2e-5, atol=1e-6)
    if function is not polynomial.logit:  # which nobody calls but with numbers just drawn
        assert bool(choice.call(function, torch.full((2,), math.nan)).isnan().all())


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("law", ["smooth-rounding", *(pytest.param(law, marks=pytest.mark.slow) for law in LAWS_SLOW)])
@pytest.mark.parametrize("grid", [pytest.param("one-sided", marks=pytest.mark.slow), "two-sided"])
def test_the_fused_quantizer_equals_the_plain_one(compiled, law, grid, monkeypatch):
    quantizer = Quantizer(3, grid=grid, low=-0.3, high=2.0, law=LAWS[law])
    x = (values(6, 4, 5, 7, top=3) - 1).to(memory_format=torch.channels_last).requires_grad_()

    def run(x):
        with rng.draw([4, 5]):
            return quantizer(x * 1)

    fused = derivatives(run, x)
    assert bool(torch.isin(fused[0], quantizer.levels()).all())
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    half = derivatives(run, x.detach().bfloat16().requires_grad_())
    monkeypatch.setattr(kernels, "quantize", None)  # would fail where it is called
    kernels.use("eager")
    plain = derivatives(run, x)
    assert torch.equal(fused[0], plain[0])
    close(fused, plain)
    close(half[:2], derivatives(run, x.detach().bfloat16().requires_grad_())[:2], rtol=2e-2)


@needs_compiler
@pytest.mark.parametrize("grid", [pytest.param("one-sided", marks=pytest.mark.slow), "two-sided"])
def test_the_fused_quantizer_trains_its_range_as_the_plain_one(compiled, grid):
    quantizer = Quantizer(3, grid=grid, low=-0.3, high=2.0, law=SmoothRounding(), learned=True)
    x = (values(6, 4, 5, 7, top=3) - 1).to(memory_format=torch.channels_last).requires_grad_()

    def run(x):
        with rng.draw([4, 5]):
            return quantizer(x * 1)

    fused = derivatives(run, x, *quantizer.parameters())
    kernels.use("eager")
    close(fused, derivatives(run, x, *quantizer.parameters()))


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    "law", [Deterministic(), Deterministic(smooth_as=SmoothRounding()), StochasticRounding()], ids=str
)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("grid", [pytest.param("one-sided", marks=pytest.mark.slow), "two-sided"])
def test_the_fused_quantizer_without_smooth_noise_equals_the_plain_one(compiled, law, learned, grid, monkeypatch):
    quantizer = Quantizer(3, grid=grid, low=-0.3, high=2.0, law=law, learned=learned)
    x = (values(6, 4, 5, 7, top=3) - 1).to(memory_format=torch.channels_last)
    x[:, :2, :2] = quantizer.levels()[-1]  # the gradient at the end of the range is that inside
    x.requires_grad_()

    def run(x):
        with rng.draw([4, 5] if law.stochastic else 4):
            return quantizer(x * 1)

    trained = tuple(quantizer.parameters())
    name = "quantize" if law.stochastic else "round_nearest"
    asked, asking = [], getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *given: asked.append(given) or asking(*given))
    fused = derivatives(run, x, *trained)
    assert asked
    assert bool(torch.isin(fused[0], quantizer.levels()).all())
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    half = derivatives(run, x.detach().bfloat16().requires_grad_(), *trained)
    monkeypatch.setattr(kernels, name, None)  # would fail where it is called
    kernels.use("eager")
    plain = derivatives(run, x, *trained)
    assert torch.equal(fused[0], plain[0])
    close(fused, plain)
    close(half[:2], derivatives(run, x.detach().bfloat16().requires_grad_(), *trained)[:2], rtol=2e-2)


@needs_compiler
@pytest.mark.parametrize("law", ["smooth-rounding", pytest.param("logistic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("grid", [pytest.param("one-sided", marks=pytest.mark.slow), "two-sided"])
def test_the_fused_mean_equals_the_plain_one(compiled, law, grid, monkeypatch):
    quantizer = Quantizer(3, grid=grid, low=-0.3, high=2.0, law=LAWS[law], learned=True)
    x = (values(6, 4, 5, 7, top=3) - 1).to(memory_format=torch.channels_last).requires_grad_()

    def run(x):
        with without_noise("mean"):
            return quantizer(x * 1)

    asked, expect = [], kernels.expect
    monkeypatch.setattr(kernels, "expect", lambda *given: asked.append(given) or expect(*given))
    fused = derivatives(run, x, *quantizer.parameters())
    assert asked
    assert fused[0].is_contiguous(memory_format=torch.channels_last)
    half = derivatives(run, x.detach().bfloat16().requires_grad_(), *quantizer.parameters())
    monkeypatch.setattr(kernels, "expect", None)  # would fail where it is called
    kernels.use("eager")
    torch.testing.assert_close(fused[0], quantizer.mean(x).detach())
    close(fused, derivatives(run, x, *quantizer.parameters()))
    close(half[:2], derivatives(run, x.detach().bfloat16().requires_grad_())[:2], rtol=2e-2)


@needs_compiler
def test_a_surrogate_changes_the_gradient_of_the_fused_quantizer(compiled):
    quantizer = Quantizer(2, grid="one-sided", high=3.0)
    for surrogate in (Surrogate(width=2.0), Surrogate(backward="straight-through")):
        results = []
        for mode in ("compiled", "eager"):
            x = values(4, 9, top=3).requires_grad_()
            with kernels.use(mode), surrogate(), rng.draw(3):
                out = quantizer(x)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), x)])
        close(*results)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "bias": False}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_second_derivatives_of_convolutions_are_those_of_torch(options, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options).double().to(memory_format=layout)
    layer = QuantLayer(conv, Quantizer(8, grid="symmetric", law=Deterministic()))
    weight = layer.quantizer(conv.weight).detach().requires_grad_()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    assert kernels.fits_convolution(conv, x)
    known = derivatives(lambda x: conv._conv_forward(x, weight, conv.bias), x, weight)
    close(derivatives(lambda x: kernels.convolve(conv, x, weight), x, weight), known, rtol=1e-9)
    close(derivatives(layer, x, conv.weight), derivatives(lambda x: native(layer, x), x, conv.weight), rtol=1e-9)
    # A loss of the gradient of the weight reaches everything too.
    outcomes = []
    for function in (lambda: kernels.convolve(conv, x, weight), lambda: conv._conv_forward(x, weight, conv.bias)):
        (first,) = torch.autograd.grad(function().square().sum(), weight, create_graph=True)
        outcomes.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    close(*outcomes, rtol=1e-9)


@pytest.mark.parametrize(("stride", "padding", "kernel"), [((1, 1), (1, 1), (3, 3)), ((2, 3), (0, 2), (3, 2))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_a_weight_as_a_product_is_that_of_torch(stride, padding, kernel, layout):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(6, 4, *kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, None, stride, padding)
    gradient = torch.randn_like(y)
    (known,) = torch.autograd.grad(y, weight, gradient)
    torch.testing.assert_close(product_gradient(gradient, x, kernel, stride=stride, padding=padding), known)


STRIDED = {"stride": 2}


@pytest.mark.parametrize(
    ("cpu", "channels", "pixels", "dtype", "options", "expected"),
    [
        ("amx", 4, 6, torch.bfloat16, {}, 2),  # the gradient of the weight, and that of the gradient of the image
        ("amx", 4, 6, torch.float32, {}, 0),
        ("amx", 4, 7, torch.bfloat16, {}, 0),
        ("amx", 4, 6, torch.bfloat16, {"groups": 2}, 0),
        ("amx", 4, 6, torch.bfloat16, {"dilation": 2, "padding": 2}, 0),
        ("avx512_bf16", 64, 16, torch.bfloat16, STRIDED, 2),
        ("avx512_bf16", 64, 16, torch.float32, STRIDED, 0),
        ("avx512_bf16", 63, 16, torch.bfloat16, STRIDED, 0),
        ("avx512_bf16", 64, 18, torch.bfloat16, STRIDED, 0),
        ("avx512_bf16", 64, 6, torch.bfloat16, {}, 0),
        ("avx512_bf16", 64, 16, torch.bfloat16, STRIDED | {"groups": 2}, 0),
        ("none", 64, 6, torch.bfloat16, STRIDED, 0),
    ],
)
def test_gradients_of_weights_are_products_where_that_pays(
    cpu, channels, pixels, dtype, options, expected, monkeypatch
):
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 6, 3, **{"padding": 1} | options).to(dtype)
    x = torch.randn(5, channels, pixels, pixels).to(dtype).requires_grad_()
    products, outcomes = [], []
    monkeypatch.setattr(
        convolution, "product_gradient", lambda *args, **form: products.append(1) or product_gradient(*args, **form)
    )
    for count, found in ((0, "none"), (expected, cpu)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=found: found == "amx")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found == "avx512_bf16")
        outcomes.append(derivatives(lambda x: kernels.convolve(conv, x, conv.weight), x, conv.weight))
        assert len(products) == count
    *same, known = outcomes[0]
    assert all(map(torch.equal, outcomes[1], same))
    close(outcomes[1][-1:], [known], rtol=2e-2)


def native(layer, x):
    conv = layer.layer
    return F.conv2d(x, layer.quantizer(conv.weight), conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_compiled_batch_norm_equals_that_of_torch(compiled, dtype):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(5), nn.BatchNorm2d(5)
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
            norm.running_mean.fill_(90.0)
    x = (torch.randn(6, 5, 7, 8) * 3 + 100).to(memory_format=torch.channels_last)
    x = x.to(dtype).requires_grad_()
    calls = counters["stats"]["calls_captured"]
    results = derivatives(ours, x, ours.weight, ours.bias)
    assert counters["stats"]["calls_captured"] > calls, "it ran plainly"
    wide = x.detach().float().requires_grad_()
    known = derivatives(theirs, wide, theirs.weight, theirs.bias)
    known[:3] = [tensor.to(dtype) for tensor in known[:3]]
    close(results, known, rtol=1e-3 if dtype == torch.float32 else 3e-2)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(wide), theirs.eval()(wide), rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_compiled_batch_norm_with_held_statistics_equals_the_plain_one(compiled, dtype):
    norm = BatchNorm(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    x = (
        (torch.randn(6, 5, 7, 8, generator=torch.Generator().manual_seed(0)) * 3 + 2)
        .to(memory_format=torch.channels_last)
        .to(dtype)
        .requires_grad_()
    )
    assert "_Normalize" in norm(x).grad_fn.name(), "it ran plainly"
    results = derivatives(norm, x, norm.weight, norm.bias, within=kernels.statistics_held)
    wide = x.detach().float().requires_grad_()
    with kernels.use("eager"):
        known = derivatives(norm, wide, norm.weight, norm.bias, within=kernels.statistics_held)
        through = derivatives(norm, wide, norm.weight, norm.bias)
    known[:3] = [tensor.to(dtype) for tensor in known[:3]]
    close(results, known, rtol=1e-3 if dtype == torch.float32 else 3e-2)
    assert (known[1] - through[1]).norm() > 0.1 * known[1].norm()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gelu_has_the_derivatives_of_torch(compiled, dtype):
    x = (torch.randn(4, 6, 5, 5) * 2).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    calls = counters["stats"]["calls_captured"]
    results = derivatives(kernels.gelu, x)
    assert counters["stats"]["calls_captured"] > calls, "it ran plainly"
    known = derivatives(F.gelu, x.detach().float().requires_grad_())
    close(results, [tensor.to(dtype) for tensor in known], rtol=1e-5 if dtype == torch.float32 else 3e-2)
    assert kernels.fits_gelu(x)
    assert not kernels.fits_gelu(x.detach())


@needs_compiler
@pytest.mark.parametrize("channels", [None, 6, 1])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_rounding_of_weights_equals_plain_rounding(compiled, channels, layout, monkeypatch):
    quantizer = Quantizer(3, grid="symmetric", high=0.9, law=Deterministic(), learned=True, channels=channels, axis=0)
    weight = torch.randn(channels or 6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = weight.to(memory_format=layout).requires_grad_()

    def run(x):
        return quantizer(x) * torch.linspace(-1, 2, x.numel()).view(x.shape)

    calls = []
    monkeypatch.setattr(
        choice, "call", lambda *args, call=choice.call, **rest: calls.append(args) or call(*args, **rest)
    )
    results = derivatives(run, weight, quantizer.log_step)
    assert len(calls) == 2, "forwards once; backwards once, and plainly where a graph is asked for"
    with kernels.use("eager"):
        known = derivatives(run, weight, quantizer.log_step)
        levels = quantizer(weight)
    close(results, known)
    assert quantizer(weight).equal(levels)
