"""Check that a quantizer, an attack or an estimator keeps its contract: for its author's own tests, and for ours.

Each check takes one object, tries it on small inputs and raises `ContractError` at the first promise that is broken.
What depends on chance is allowed five standard errors and drawn from the given seed: a check passes always or never.
"""

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from typing import get_args

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from bitquorum import registry, rng
from bitquorum.attacks import Attack, AttackResult, Criterion
from bitquorum.geometry import Norm, norm_of
from bitquorum.information import Bound, Estimate, Estimator
from bitquorum.interface import BitquorumError, Cost, InputError, Method
from bitquorum.quantizers import Backward, Quantizer, Surrogate

__all__ = ["ContractError", "check_attack", "check_estimator", "check_quantizer"]

_ERRORS = 5.0  # standard errors that chance may take


class ContractError(BitquorumError, AssertionError):
    """Report a promise that an implementation does not keep."""


def check_quantizer(quantizer: Quantizer, *, seed: int = 0, draws: int = 1000) -> None:
    """Check a quantizer, and with it its noise law and grid.

    In float32 and float64, on inputs within the range and beyond both ends: values are levels bit for bit, with and
    without a gradient, and the codes decode to them, in half precision too. Inside a draw equal calls give equal
    values, wherever the examples lie in the batch, also after pickle and copy; two seeds differ if the law is
    `stochastic`, and only then; torch's generator is left alone. P(k | x) is a distribution whose mean is `mean`, and
    draws follow it within standard errors. No surrogate changes a value, every gradient is finite, and that of `mean`,
    where the law is `smooth`, is the derivative of the closed form.

    Args:
        quantizer: Left as it is.
        seed: Of the inputs and draws.
        draws: Number of draws behind the comparison of frequencies.

    Raises:
        ContractError: at the first promise that is broken.

    Examples:
        >>> from bitquorum.quantizers import Gaussian
        >>> check_quantizer(Quantizer(3, grid="symmetric", law=Gaussian(), learned=True))
    """
    for dtype in (torch.float32, torch.float64):
        subject = copy.deepcopy(quantizer).to(dtype)
        x = _around_the_grid(subject, dtype, seed)
        _check_values(subject, x, seed)
        _check_draws(subject, x, seed)
        _check_gradients(subject, x, seed)
    subject = copy.deepcopy(quantizer).double()
    _check_probabilities(subject, _around_the_grid(subject, torch.float64, seed), seed, draws)


def check_attack(
    attack: Attack,
    *,
    model: nn.Module | None = None,
    images: Float[Tensor, "batch *image"] | None = None,
    labels: Int[Tensor, "batch"] | None = None,
    epsilon: float = 0.1,
    seed: int = 0,
) -> None:
    """Check an attack.

    It comes back from pickle, a copy and its table as itself. On float32 and float64 images: what it returns has the
    shape and type of the images, is finite, in [0, 1] and within `epsilon` (to rounding); equal calls give equal
    results, and so do the two halves of the batch, and several versions of an image in one pass (`at_once`); images,
    model and torch's generator are left as they were. Its cost is the largest number of passes that one image took. It
    calls the model inside a draw that names the examples, raises the caller's criterion over the batch, costs nothing
    at a radius of zero, and refuses bad images and labels. In each of its norms it stays within `epsilon`.

    Args:
        attack: The attack.
        model: What to attack; by default a smooth random network with two members.
        images: At least two images in [0, 1]; by default six of 1x4x4 pixels, with saturated ones.
        labels: True classes of `images`.
        epsilon: Radius.
        seed: Of the attack.

    Raises:
        ContractError: at the first promise that is broken.

    Examples:
        >>> from bitquorum.attacks import PGD
        >>> check_attack(PGD(steps=3, restarts=2, eot=2))
    """
    _check_method(attack)
    _expect(bool(attack.label) and isinstance(attack.label, str), f"a label, got {attack.label!r}")
    if images is None:
        images = (1.4 * rng.uniform(seed, torch.arange(6), 16, address="images") - 0.2).clamp(0, 1).view(6, 1, 4, 4)
    labels = torch.arange(len(images)) % 3 if labels is None else labels
    for dtype in (torch.float32, torch.float64):
        subject = (_Random(images[0].numel(), seed) if model is None else copy.deepcopy(model)).to(dtype).eval()
        _check_attack_on(attack, _Counting(subject), images.to(dtype), labels, epsilon, seed)


def check_estimator(
    estimator: Estimator,
    sample: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    information: float,
    *,
    samples: int = 1000,
    repeats: int = 16,
    tolerance: float = 0.0,
    seed: int = 0,
) -> None:
    """Check an estimator on a law whose mutual information is known.

    It comes back from pickle, a copy and its table as itself, equal calls give equal estimates, and it leaves the
    samples and torch's generator alone. Over repeated samples its mean agrees with the declared `bound`: near the
    truth for a `plug-in`, not above it for `lower`, not below it for `upper`, within standard errors and `tolerance`;
    the standard errors that it states are not below half the spread that is seen. It refuses unpaired samples.

    Args:
        estimator: The estimator.
        sample: Return `n` pairs, drawn by a generator.
        information: The mutual information of the law, in bits.
        samples: Number of pairs in an estimate.
        repeats: Number of estimates, at least two.
        tolerance: Bias in bits that is known and granted.
        seed: Of the samples.

    Raises:
        ContractError: at the first promise that is broken.

    Examples:
        >>> from bitquorum.information import PlugIn
        >>> def equal_bits(n, generator):
        ...     bits = torch.randint(2, (n,), generator=generator)
        ...     return bits, 1 - bits
        >>> check_estimator(PlugIn(), equal_bits, 1.0)
    """
    _check_method(estimator)
    _expect(estimator.unit == "bits", f"the unit bits, got {estimator.unit!r}")
    _expect(estimator.bound in get_args(Bound), f"a bound of {get_args(Bound)}, got {estimator.bound!r}")
    pairs = [sample(samples, _generator(rng.derive(seed, index))) for index in range(max(2, repeats))]
    first, second = pairs[0]
    before = first.clone(), second.clone(), torch.get_rng_state()
    estimates = [estimator(a, b) for a, b in pairs]
    _expect(torch.equal(first, before[0]) and torch.equal(second, before[1]), "samples that are left alone, got others")
    _expect(torch.equal(torch.get_rng_state(), before[2]), "no use of torch's generator; take a seed as a field")
    for twin in (estimator, pickle.loads(pickle.dumps(estimator)), copy.deepcopy(estimator)):
        again = twin(first, second)
        _expect(again == estimates[0], f"equal estimates from equal calls, got {again} after {estimates[0]}")
    _check_estimates(estimator.bound, estimates, information, samples, tolerance)
    _expect_refusal("samples that are not paired", lambda: estimator(first, second[:-1]))


def _expect(kept: bool, promise: str) -> None:
    if not kept:
        raise ContractError(f"expected {promise}")


def _expect_refusal(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except (InputError, TypeError):  # a run-time check of shapes, where one is on, comes first and is a TypeError
        return
    raise ContractError(f"expected an InputError for {what}, got a result")


def _check_method(method: Method) -> None:
    for way, twin in (
        ("pickle", pickle.loads(pickle.dumps(method))),
        ("deepcopy", copy.deepcopy(method)),
        ("registry.encode and decode", registry.decode(type(method), registry.encode(method))),
    ):
        _expect(twin == method and hash(twin) == hash(method), f"{method!r} back from {way}, got {twin!r}")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _around_the_grid(quantizer: Quantizer, dtype: torch.dtype, seed: int) -> Tensor:
    """Return six rows of inputs from below the lowest level to above the highest, channels where they belong."""
    levels = quantizer.levels()
    low, high = levels[..., 0, None], levels[..., -1, None]
    share = torch.rand(6, *levels.shape[:-1], 12, generator=_generator(seed), dtype=dtype)
    x = low + (1.6 * share - 0.3) * (high - low)
    if levels.dim() == 1:
        return x
    if quantizer.axis == 0:
        return x.movedim(1, 0).flatten(1)
    x = x.movedim(1, -1)
    return x.reshape(6, *[1] * (quantizer.axis + 1 - x.dim()), *x.shape[1:]).movedim(-1, quantizer.axis)


def _quantize(quantizer: Quantizer, x: Tensor, seeds: int | list[int], examples: Tensor | None = None) -> Tensor:
    with rng.draw(seeds, examples):
        return quantizer(x)


def _check_values(quantizer: Quantizer, x: Tensor, seed: int) -> None:
    value = _quantize(quantizer, x, seed).detach()
    _expect(value.shape == x.shape and value.dtype == x.dtype, f"{x.dtype} {tuple(x.shape)}, got {value.dtype}")
    with rng.draw(seed):
        codes = quantizer.codes(x)
    _expect(codes.dtype == torch.uint8 and int(codes.max()) <= quantizer.top, f"uint8 codes up to {quantizer.top}")
    _expect(torch.equal(quantizer.decode(codes), value), "codes that decode to the values bit for bit")
    levels = quantizer.levels()
    index = codes.long()
    if levels.dim() == 1:
        chosen = levels[index]
    else:
        index = index.movedim(quantizer.axis, 0)
        chosen = levels.gather(1, index.flatten(1)).view_as(index).movedim(0, quantizer.axis)
    _expect(torch.equal(chosen, value), "values that equal a level bit for bit")
    traced = _quantize(quantizer, x.clone().requires_grad_(), seed).detach()
    _expect(torch.equal(traced, value), "the same values with a gradient as without")
    if x.dtype == torch.float32:
        half = x.half()
        with rng.draw(seed):
            narrow = quantizer.decode(quantizer.codes(half)).half()
        _expect(torch.equal(_quantize(quantizer, half, seed), narrow), "the values of the codes in half precision")


def _check_draws(quantizer: Quantizer, x: Tensor, seed: int) -> None:
    state = torch.get_rng_state()
    value = _quantize(quantizer, x, seed)
    _expect(torch.equal(torch.get_rng_state(), state), "no use of torch's generator inside a draw")
    for way, twin in (
        ("called again", quantizer),
        ("pickled", pickle.loads(pickle.dumps(quantizer))),
        ("copied", copy.deepcopy(quantizer)),
    ):
        _expect(torch.equal(_quantize(twin, x, seed), value), f"equal values inside a draw, got others when {way}")
    differs = not torch.equal(_quantize(quantizer, x, seed + 1), value)
    declared = quantizer.law.stochastic
    _expect(differs == declared, f"draws that differ only if the law is stochastic ({declared}), got {differs}")
    if quantizer.axis != 0 or quantizer.log_step.dim() == 0:
        order = torch.randperm(len(x), generator=_generator(seed))
        moved = _quantize(quantizer, x[order], seed, order)
        _expect(torch.equal(moved, value[order]), "values that do not depend on the place in the batch")
        both = _quantize(quantizer, torch.cat([x, x]), [seed, seed + 1])
        single = torch.cat([value, _quantize(quantizer, x, seed + 1)])
        _expect(torch.equal(both, single), "two seeds in one batch that equal two single draws")


def _check_gradients(quantizer: Quantizer, x: Tensor, seed: int) -> None:
    value = _quantize(quantizer, x, seed).detach()
    for backward in (None, *get_args(Backward)):
        leaf = x.clone().requires_grad_()
        with Surrogate(backward=backward, width=2.0)():
            shown = _quantize(quantizer, leaf, seed)
        (gradient,) = torch.autograd.grad(shown.sum(), leaf)
        _expect(torch.equal(shown.detach(), value), f"values that no surrogate changes, got others with {backward}")
        _expect(bool(gradient.isfinite().all()), f"a finite gradient, got NaN or infinity with {backward}")
    if quantizer.law.smooth:
        leaf = x.clone().requires_grad_()
        with Surrogate(backward="mean")():
            (shown,) = torch.autograd.grad(_quantize(quantizer, leaf, seed).sum(), leaf)
        (exact,) = torch.autograd.grad(quantizer.mean(leaf).sum(), leaf)
        gap = float((shown - exact).abs().max())
        _expect(gap < 1e-4, f"the derivative of the mean as its gradient, got one that is {gap:.2g} away")


@torch.no_grad()
def _check_probabilities(quantizer: Quantizer, x: Tensor, seed: int, draws: int) -> None:
    p = quantizer.probabilities(x)
    _expect(float(p.min()) > -1e-12, f"probabilities of at least zero, got {float(p.min()):.2g}")
    _expect(float((p.sum(-1) - 1).abs().max()) < 1e-6, "probabilities that sum to one")
    codes = torch.arange(quantizer.top + 1, dtype=torch.uint8)
    levels = torch.stack([quantizer.decode(code.expand(x.shape)) for code in codes], -1)
    gap = float(((p * levels).sum(-1) - quantizer.mean(x)).abs().max())
    _expect(gap < 1e-6 * float(levels.abs().max()), f"a mean over P(k | x) that is `mean`, got one {gap:.2g} away")
    given = rng.uniform(seed, torch.arange(draws), x.numel(), address="probabilities").view(draws, *x.shape).to(x.dtype)
    for way, noises in (("drawn", [None] * draws), ("given", given)):
        counts = torch.zeros_like(p)
        for index, noise in enumerate(noises):
            with rng.draw(rng.derive(seed, index)):
                codes = quantizer.codes(x, noise=noise).long()
            counts.scatter_add_(-1, codes[..., None], torch.ones_like(p[..., :1]))
        # Rare cells are near Poisson, with tails beyond the normal ones: hence the constant term.
        allowed = _ERRORS * (draws * p * (1 - p)).clamp(min=0).sqrt() + _ERRORS
        worst = float(((counts - draws * p).abs() - allowed).max())
        _expect(worst <= 0, f"draws that follow P(k | x), got {worst:.0f} of {draws} too far off with noise {way}")


class _Random(nn.Module):
    """Classify smoothly by two members, with noise on the image; a row's arithmetic does not know the batch."""

    def __init__(self, pixels: int, seed: int) -> None:
        super().__init__()
        weights = rng.uniform(seed, torch.arange(2 * 3), pixels, address="weights").view(2, 1, 3, pixels)
        self.weights = nn.Parameter(4 * weights - 2)

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw 2 batch 3"]:
        ambient = rng.current()
        count = len(ambient.seeds) if ambient else 1
        x = images.flatten(1).repeat(count, 1)
        x = (x + 0.1 * (rng.uniform_like(x, "testing") - 0.5)).unflatten(0, (count, -1))
        return (x[:, None, :, None, :] * self.weights).sum(-1).tanh()


class _Counting:
    """Count the forward and backward passes that each example takes."""

    def __init__(self, inner: nn.Module) -> None:
        self.inner, self.forward, self.backward = inner, Counter[int](), Counter[int]()

    def __call__(self, images: Float[Tensor, "batch *image"], /) -> Float[Tensor, "draw member batch classes"]:
        ambient = rng.current()
        if ambient is None or ambient.examples is None:
            raise ContractError("expected calls of the model inside `rng.draw(seeds, examples)`, got one without")
        passes = {example: count * len(ambient.seeds) for example, count in Counter(ambient.examples.tolist()).items()}
        self.forward.update(passes)
        logits = self.inner(images)
        if logits.requires_grad:
            logits.register_hook(lambda _: self.backward.update(passes))
        return logits

    def largest(self) -> Cost:
        """Return the passes of the example that took most."""
        return Cost(forward=max(self.forward.values(), default=0), backward=max(self.backward.values(), default=0))


def _check_attack_on(
    attack: Attack, model: _Counting, images: Tensor, labels: Tensor, epsilon: float, seed: int
) -> None:
    examples = torch.arange(len(images)) + 100
    before = images.clone(), torch.get_rng_state(), copy.deepcopy(model.inner.state_dict())

    def run(part: slice, criterion: Criterion | None = None, at_once: int = 0) -> AttackResult:
        x, y, index = images[part], labels[part], examples[part]
        return attack(model, x, y, epsilon=epsilon, examples=index, seed=seed, criterion=criterion, at_once=at_once)

    result = run(slice(None))
    _check_images(result.images, images, epsilon, "linf")
    spent = model.largest()
    _expect(result.cost == spent, f"a cost of what an image takes at most, {spent}, got {result.cost}")
    _expect(torch.equal(images, before[0]), "images that are left alone, got others")
    _expect(torch.equal(torch.get_rng_state(), before[1]), "no use of torch's generator; draw by `rng`")
    _expect(rng.current() is None, "no draw left behind")
    _expect(all(p.grad is None for p in model.inner.parameters()), "no gradient left in the model's parameters")
    state = model.inner.state_dict()
    _expect(all(torch.equal(value, state[name]) for name, value in before[2].items()), "a model that is left alone")
    again = copy.deepcopy(attack)(model, images, labels, epsilon=epsilon, examples=examples, seed=seed)
    _expect(torch.equal(again.images, result.images), "equal images from equal calls")
    half = len(images) // 2
    halves = torch.cat([run(slice(half)).images, run(slice(half, None)).images])
    gap = float((halves - result.images).abs().max())
    _expect(gap < 1e-4, f"images that do not depend on the batch, got a difference of {gap:.2g} by halves")
    together = run(slice(None), at_once=3 * len(images))
    gap = float((together.images - result.images).abs().max())
    _expect(gap < 1e-4, f"images that do not depend on `at_once`, got a difference of {gap:.2g}")
    _expect(together.cost == spent, f"a cost that does not depend on `at_once`, {spent}, got {together.cost}")
    seen: list[int] = []
    led = run(slice(None), lambda logits: seen.append(1) or logits.mean((0, 1))[:, 0])
    _expect(bool(seen) or spent == Cost(), "an attack that climbs the caller's criterion, got one that ignores it")
    with torch.no_grad(), rng.draw(rng.derive_many(seed, 64, "criterion"), examples):
        rise = float((model.inner(led.images) - model.inner(images))[..., 0].mean())
    _expect(not seen or rise > 0, f"an attack that raises the caller's criterion, got a change of {rise:.2g}")
    for norm in attack.norms:
        found = attack(model, images, labels, epsilon=epsilon, examples=examples, seed=seed, norm=norm)
        _check_images(found.images, images, epsilon, norm)
    free = attack(model, images, labels, epsilon=0.0, examples=examples, seed=seed)
    _expect(torch.equal(free.images, images) and free.cost == Cost(), "the images at no cost for a radius of zero")
    for what, bad in (("images beyond [0, 1]", images + 1), ("images with NaN", images * math.nan)):
        _expect_refusal(what, lambda bad=bad: attack(model, bad, labels, epsilon=epsilon))
    _expect_refusal("too few labels", lambda: attack(model, images, labels[:-1], epsilon=epsilon))
    _expect_refusal("a negative radius", lambda: attack(model, images, labels, epsilon=-epsilon))


def _check_images(found: Tensor, images: Tensor, epsilon: float, norm: Norm) -> None:
    _expect(
        found.shape == images.shape and found.dtype == images.dtype and not found.requires_grad,
        f"plain {images.dtype} images {tuple(images.shape)}, got {found.dtype} {tuple(found.shape)}",
    )
    _expect(bool(found.isfinite().all()), "finite images, got NaN or infinity")
    _expect(float(found.min()) >= 0 and float(found.max()) <= 1, "images in [0, 1]")
    reach = float(norm_of(found - images, norm).max())
    _expect(reach <= epsilon + 1e-6, f"a perturbation of at most {epsilon} in {norm}, got {reach}")


def _check_estimates(
    bound: Bound, estimates: list[Estimate], information: float, samples: int, tolerance: float
) -> None:
    for estimate in estimates:
        _expect(
            isinstance(estimate, Estimate) and estimate.samples == samples and math.isfinite(estimate.value),
            f"a finite estimate from {samples} samples, got {estimate}",
        )
    values: Shaped[Tensor, "repeats"] = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    mean, spread = float(values.mean()), float(values.std())
    error = _ERRORS * spread / math.sqrt(len(values)) + tolerance + 1e-9
    if bound != "lower":
        _expect(mean >= information - error, f"a mean of at least {information:.4f} - {error:.4f}, got {mean:.4f}")
    if bound != "upper":
        _expect(mean <= information + error, f"a mean of at most {information:.4f} + {error:.4f}, got {mean:.4f}")
    stated = sum(estimate.standard_error for estimate in estimates) / len(estimates)
    # The spread is itself uncertain by one part in sqrt(2 (n - 1)); at a maximum of the MI it has no first order.
    seen = spread * max(0.0, 1 - 4 / math.sqrt(2 * (len(values) - 1)))
    _expect(stated >= seen / 2 - tolerance - 2 / samples, f"a standard error near {spread:.4f}, got {stated:.4f}")
