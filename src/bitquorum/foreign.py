"""Make anybody's classifier a model that attacks and the ladder understand, and say what is odd about it."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.conversion import is_stochastic
from bitquorum.ensemble import Ensemble, check_labels, check_recorded, classifier
from bitquorum.interface import InputError
from bitquorum.relax import relaxed

Noise = Literal["none", "torch", "any"]

_PROBE: Final = 16  # images that inspection looks at
_CALLS: Final = 16  # that must agree
_FLAT: Final = 0.5  # share of probed images without a gradient from which on attacks see relaxed derivatives


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Say what was noticed about a model, and what is done about it.

    Attributes:
        name: `training-mode`, `random`, `unseeded`, `probabilities`, `votes`, `zero-gradient` or `not-relaxed`.
        text: One sentence for the reader of a report.
    """

    name: str
    text: str


@final
class Wrapped(nn.Module):
    """Present a module as a model with one member: logits `[draw, 1, batch, classes]`, random only through `rng.draw`.

    Each draw seeds the generators that the module uses, so that a draw is a deterministic function of its seed and the
    batch: what the module draws for an image depends on the image's place. Quantizers of ours inside the module take
    their noise from the draw itself.

    Args:
        module: From images to logits `[batch, classes]`, or to an output that holds them (`.logits`, a tuple, a dict).
        noise: Whose noise, beside that of our quantizers, makes two calls differ: `none`; that of `torch`, whose
            generator each draw then seeds; or `any`, where it seeds those of numpy and Python too.
        scale: What the module returns: `logits`, `probabilities` or `votes`.
        relax: Whether derivatives are relaxed; see `relax`.
        findings: Of the inspection.

    Attributes:
        passes: Number of draws of one prediction, 1.
        needs_relaxing: Whether most images have no gradient of their own.
    """

    passes = 1

    def __init__(
        self,
        module: nn.Module,
        *,
        noise: Noise = "none",
        scale: str = "logits",
        relax: bool = False,
        findings: Sequence[Finding] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self.noise: Noise = noise
        self.scale, self.relax = scale, relax
        self.findings = tuple(findings)

    @property
    def stochastic(self) -> bool:
        """Whether two draws can differ."""
        return self.noise != "none" or is_stochastic(self.module)

    @property
    def needs_relaxing(self) -> bool:
        """Whether inspection found no gradient."""
        return any(finding.name == "zero-gradient" for finding in self.findings)

    def relaxed_copy(self) -> "Wrapped":
        """Return the same model, sharing its weights, with relaxed derivatives; its own, where it fails under them."""
        relax = all(finding.name != "not-relaxed" for finding in self.findings)
        return Wrapped(self.module, noise=self.noise, scale=self.scale, relax=relax, findings=self.findings)

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw 1 batch classes"]:
        """Return the logits under every ambient draw; a module without noise is asked once."""
        ambient = rng.current()
        seeds: Sequence[int] = ambient.seeds if ambient else (rng.fresh_seed(),)
        examples = ambient.examples if ambient else None
        with ExitStack() as stack:
            if self.relax:
                stack.enter_context(relaxed(self.module))
            if not self.stochastic:
                return self._logits(self.module(images))[None, None].expand(len(seeds), -1, -1, -1)
            parts, set_seed = [], stack.enter_context(_seedable(self.noise))
            for seed in seeds:
                set_seed(seed)
                with rng.draw(seed, examples):
                    parts.append(self._logits(self.module(images)))
        return torch.stack(parts)[:, None]

    def features(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw batch features"]:
        """Return what the last linear layer is given, or the logits where there is none; see `Ensemble.outputs`."""
        seen: list[Tensor] = []
        try:
            hook = classifier(self.module).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        except InputError:
            return self(images)[:, 0]
        try:
            draws = len(self(images))
        finally:
            hook.remove()
        if not seen or any(value.shape[0] != images.shape[0] for value in seen) or len(seen) not in (1, draws):
            return self(images)[:, 0]  # the layer is used in another way than once for each image
        return torch.stack([value.flatten(1) for value in seen]).expand(draws, -1, -1)

    def predict(self, logits: Float[Tensor, "draw 1 batch classes"]) -> Int[Tensor, "draw batch"]:
        """Return the predicted classes of every draw, -1 where a logit is not a number; see `Ensemble.predict`."""
        return logits[:, 0].argmax(-1).masked_fill(logits[:, 0].isnan().any(-1), -1)

    def _logits(self, output: Any) -> Tensor:
        logits = output_of(output)
        if self.scale == "logits":
            return logits
        return logits.clamp(min=0).add(1e-12 if self.scale == "probabilities" else 1e-3).log()


@final
class Normalized(nn.Module):
    """Subtract the mean of each channel, divide by its deviation, and call a module."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise InputError(f"expected a mean and a positive deviation for each channel, got {mean} and {std}")
        self.module = module
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return the module's output on normalized images."""
        return self.module((images - self.mean) / self.std)


def wrap(
    model: nn.Module,
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"] | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Wrapped | Ensemble:
    """Inspect a classifier on some images and return it as a model; an `Ensemble` is returned as it is.

    A model in training mode is copied and put into evaluation mode. Probabilities and votes are turned into logarithms.
    Noise is found by calling twice; noise that no seed governs is allowed and reported. A model of which most images
    have a gradient of zero is marked, so that attacks see relaxed derivatives; where it fails under them,
    attacks see its own.

    Args:
        model: From images in [0, 1], or normalized ones where `mean` and `std` are given, to logits.
        images: A few images in [0, 1]; the first sixteen are used.
        labels: Their true classes, to check that they are among the model's.
        mean: Of each channel, subtracted before the model.
        std: Of each channel, by which is divided.

    Raises:
        InputError: for `mean` and `std` of what is a model already, and for a model that cannot be judged: no float
            output `[batch, classes]`, outputs that are not finite, outputs that depend on the other images of the
            batch, labels beyond the classes, or an error of its own.

    Examples:
        >>> model = wrap(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softmax(-1)).eval(), torch.rand(5, 1, 2, 2))
        >>> [finding.name for finding in model.findings]
        ['probabilities']
    """
    _check_module(model, images, normalized=mean is not None or std is not None)
    if isinstance(model, Wrapped):
        return model
    findings: list[Finding] = []
    if model.training:
        model = copy.deepcopy(model).eval()
        text = "the model was in training mode; a copy in evaluation mode is judged"
        findings.append(Finding(name="training-mode", text=text))
    if isinstance(model, Ensemble):
        with torch.no_grad(), rng.draw(0):
            for member in model.members:
                _checked(member, images[:_PROBE], labels)
        return model
    if mean is not None or std is not None:
        model = Normalized(model, mean or [0.0] * len(std or ()), std or [1.0] * len(mean or ())).eval()
    probe = images[:_PROBE]
    with torch.no_grad():
        output = _checked(model, probe, labels)
        noise, of_noise = _noise(model, probe)
        scale, of_scale = _scale(output)
        findings += [*of_noise, *of_scale]
        _check_batch(model, probe, noisy=noise != "none" or is_stochastic(model))
    wrapped = Wrapped(model, noise=noise, scale=scale, findings=findings)
    flat = _flat_share(wrapped, probe)
    try:
        still_flat = _flat_share(wrapped.relaxed_copy(), probe) >= _FLAT
    except Exception as error:  # whatever code of the model's own raises
        still_flat = True
        text = f"the model fails with relaxed derivatives ({type(error).__name__}: {error}); attacks see its own alone"
        findings.append(Finding(name="not-relaxed", text=text))
    if flat >= _FLAT:
        share = f"{100 * flat:.0f} % of the images have no gradient at all"
        text = f"{share}; attacks see relaxed derivatives of rounding, comparisons, votes and the like"
        if still_flat:
            text = f"{share}, also with relaxed derivatives; only attacks without gradients work"
        findings.append(Finding(name="zero-gradient", text=text))
    wrapped.findings = tuple(findings)
    return wrapped


def output_of(output: Any) -> Tensor:
    """Return the logits of what a classifier gives: a tensor, an object with `.logits`, a tuple or a dict."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise InputError(f"expected a tensor of logits, or an output with `.logits`, got {type(output).__name__}")
    return found


@contextmanager
def _seedable(noise: Noise) -> Iterator[Callable[[int], None]]:
    """Give the block a function that seeds the generators of a kind of noise, and restore them afterwards."""
    with rng.torch_seeds() as set_torch_seed:
        if noise != "any":
            yield set_torch_seed
            return
        before, of_numpy = random.getstate(), np.random.get_state()

        def set_seed(seed: int) -> None:
            set_torch_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)

        try:
            yield set_seed
        finally:
            random.setstate(before)
            np.random.set_state(of_numpy)


def _call(model: nn.Module, images: Tensor, seed: int, noise: Noise = "any") -> Tensor:
    with rng.draw(seed), _seedable(noise) as set_seed:
        set_seed(seed)
        return output_of(model(images))


def _check_module(model: nn.Module, images: Tensor, *, normalized: bool) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}; call yours from a module's forward")
    check_recorded(images, model)
    if normalized and isinstance(model, Wrapped | Ensemble):
        raise InputError(
            f"expected a plain module to normalize images for, got a {type(model).__name__} with a mean or a "
            "deviation; normalization belongs into its members"
        )


def _checked(model: nn.Module, images: Tensor, labels: Tensor | None) -> Tensor:
    """Return the model's output on the probe, or refuse it."""
    try:
        output = _call(model, images, 0)
    except InputError:
        raise
    except Exception as error:
        shape = tuple(images.shape)
        raise InputError(
            f"expected a model that takes float images of shape {shape} in [0, 1], got {type(error).__name__}: {error}"
        ) from error
    if output.dim() != 2 or len(output) != len(images) or not output.is_floating_point() or output.shape[1] < 2:
        raise InputError(
            f"expected float logits of shape ({len(images)}, classes), got {output.dtype} of shape "
            f"{tuple(output.shape)}; return one row of scores for each image"
        )
    if not bool(torch.isfinite(output).all()):
        raise InputError("expected finite outputs, got NaN or infinity; check the model's weights and normalization")
    if labels is not None:
        check_labels(labels, output.shape[1])
    return output


def _noise(model: nn.Module, images: Tensor) -> tuple[Noise, list[Finding]]:
    """Return whose noise, beside that of our quantizers, makes two calls differ, and what that means."""
    with rng.draw(0), _seedable("any") as set_seed:
        set_seed(0)
        if _repeats(lambda: output_of(model(images))):
            return "none", []
        by_torch = _repeats(lambda: _call(model, images, 1, "torch"))
    if by_torch:
        text = "two calls differ; each draw seeds torch's generator"
        return "torch", [Finding(name="random", text=text)]
    if _repeats(lambda: _call(model, images, 1)):
        text = "two calls differ; each draw seeds the generators of torch, numpy and Python"
        return "any", [Finding(name="random", text=text)]
    text = "two calls differ, and no seed of torch, numpy or Python repeats them; results vary from run to run"
    return "any", [Finding(name="random", text="two calls differ"), Finding(name="unseeded", text=text)]


def _repeats(call: Callable[[], Tensor]) -> bool:
    """Return whether many calls agree: a choice of one among two networks falls the same way twice half of the time."""
    first = call()
    return all(_same(first, call()) for _ in range(_CALLS - 1))


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max().clamp(min=1e-30)))


def _scale(output: Tensor) -> tuple[str, list[Finding]]:
    """Return what the rows are, seen from the outside: logits, probabilities or votes."""
    if float(output.min()) < 0 or (float(output.max()) > 1 + 1e-4 and not bool((output == output.round()).all())):
        return "logits", []
    total = output.sum(-1)
    if float(output.max()) <= 1 + 1e-4 and not bool((total - 1).abs().max() < 1e-3):
        return "logits", []
    levels = len(output.unique())
    if levels <= 8 and levels < output.numel() / 4 and bool((total - total[0]).abs().max() < 1e-3):
        text = "the model returns votes, which hide by how much it decides"
        return "votes", [Finding(name="votes", text=f"{text}; their logarithms are attacked")]
    if float(output.max()) > 1 + 1e-4:
        return "logits", []
    text = "the model returns probabilities; their logarithms are attacked, whose gradients vanish near 0 and 1"
    return "probabilities", [Finding(name="probabilities", text=text)]


def _check_batch(model: nn.Module, images: Tensor, *, noisy: bool) -> None:
    """Refuse a model whose output for an image changes with the other images of the batch.

    The batch keeps its size, so that seeded noise stays what it is; a noisy model is refused only if the change is
    there in the mean of many draws.
    """
    if len(images) < 2:
        return
    others = torch.cat([images[:1], 1 - images[1:]])
    seeds = range(32) if noisy else range(1)
    change = torch.stack([_call(model, images, seed)[0] - _call(model, others, seed)[0] for seed in seeds])
    scale = float(_call(model, images, 0).abs().max().clamp(min=1e-30))
    spread = change.std(0) / len(change) ** 0.5 if noisy else torch.zeros_like(change[0])
    if bool((change.mean(0).abs() > 1e-3 * scale + 5 * spread).any()):
        raise InputError(
            "expected outputs that depend on their own image alone, got ones that change with the other images of the "
            "batch (batch norm in training mode, or a statistic over the batch); put such layers into evaluation mode"
        )


def _flat_share(model: Wrapped, images: Tensor) -> float:
    """Return the share of images at which the margin between the two best classes has a gradient of exactly zero."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), rng.draw([1, 2] if model.stochastic else [1]):
        top = model(leaf).mean((0, 1)).topk(2, -1).values
        margin = (top[:, 0] - top[:, 1]).sum()
        if not margin.requires_grad:
            return 1.0
        (gradient,) = torch.autograd.grad(margin, leaf, allow_unused=True)
    if gradient is None:
        return 1.0
    return float((gradient.flatten(1).nan_to_num().abs().amax(1) == 0).float().mean())
