"""Run several networks of different precision together and aggregate what they say."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from bitquorum import kernels, rng
from bitquorum.conversion import Conversion, alternatives, is_stochastic, set_addresses, share_weights
from bitquorum.interface import InputError, Method
from bitquorum.layers import QuantLayer


@dataclass(frozen=True, kw_only=True)
class Aggregation(Method, ABC):
    """Turn the logits of several draws and members into one score per class; the largest is the prediction."""

    differentiable: ClassVar[bool]

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the scores."""


@final
@dataclass(frozen=True, kw_only=True)
class MeanProbability(Aggregation):
    """Score by the logarithm of the mean of the members' probabilities."""

    differentiable: ClassVar[bool] = True

    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return log p."""
        return mean_log_probability(logits.flatten(0, 1))


@final
@dataclass(frozen=True, kw_only=True)
class MeanLogits(Aggregation):
    """Score by the mean of the logits."""

    differentiable: ClassVar[bool] = True

    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the log-softmax of the mean logits."""
        return logits.mean((0, 1)).log_softmax(-1)


@final
@dataclass(frozen=True, kw_only=True)
class MajorityVote(Aggregation):
    """Score by the number of votes; the mean probability decides among equals."""

    differentiable: ClassVar[bool] = False

    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return votes plus half the mean probability."""
        return votes(logits) + 0.5 * logits.softmax(-1).mean((0, 1))


@final
@dataclass(frozen=True, kw_only=True)
class EmpirVote(Aggregation):
    """Score by the number of votes; the full-precision member decides every tie for the first place.

    Reference: Sen, Ravindran, Raghunathan, EMPIR, ICLR 2020, https://openreview.net/forum?id=HJem3yHKwH.

    Attributes:
        full_precision: Position of the full-precision member; -1 for the last.
    """

    full_precision: int = -1
    differentiable: ClassVar[bool] = False

    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return the votes, or under a tie the full-precision member's probabilities.

        Raises:
            InputError: if there is no member at that position.
        """
        members = logits.shape[1]
        if not -members <= self.full_precision < members:
            raise InputError(
                f"expected full_precision to be the place of one of {members} members, got {self.full_precision}"
            )
        count = votes(logits)
        tied = (count == count.amax(-1, keepdim=True)).sum(-1, keepdim=True) > 1
        return torch.where(tied, logits[:, self.full_precision].softmax(-1).mean(0), count)


def mean_log_probability(logits: Float[Tensor, "views batch classes"]) -> Float[Tensor, "batch classes"]:
    """Return the logarithm of the probability averaged over the first dimension, stably."""
    logp = logits.log_softmax(-1)
    return logp[0] if len(logp) == 1 else logp.logsumexp(0) - torch.tensor(float(len(logp))).log()


def votes(logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
    """Return how many (draw, member) pairs prefer each class."""
    choice = logits.argmax(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, choice, 1.0).sum((0, 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Outputs:
    """Hold what the members said: logits, and penultimate features `[draw * batch, ...]`, draw by draw.

    Attributes:
        parts: The logits of each member by itself: a gradient of one of them runs through no other member.
        features: Of each member.
    """

    parts: tuple[Float[Tensor, "draw batch classes"], ...]
    features: tuple[Tensor, ...]

    @cached_property
    def logits(self) -> Float[Tensor, "draw member batch classes"]:
        """The logits of all members."""
        return torch.stack(self.parts, 1)


@final
class Ensemble(nn.Module):
    """Run members on the same images and return the logits of each.

    Inside `rng.draw` with T seeds a call returns T draws; outside of it, one fresh draw. Members without noise run once
    and their logits are repeated; in evaluation mode, what an `nn.Sequential` has before its first noise runs once too.

    A mirrored ensemble asks every member twice in evaluation mode, about the image and about its mirror image, under
    the same draw. The answers to the mirror images count as those of further members, and attacks see through all. It
    costs twice the inference and no training, where `Augment(flip=True)` shows members both. A shifted ensemble does so
    with the image moved down and to the right, as `Augment(crop=shift)` may move it, so that strides meet other pixels;
    one that is both asks four times.

    Args:
        members: Networks from images in [0, 1] to logits, quantized or float, with separate or shared weights. Their
            noise is named after their place here from then on: give another ensemble a deep copy of a member, or the
            members of this one may come to share noise.
        aggregation: How a prediction is made.
        passes: Number of draws that one prediction averages over.
        mirrored: Whether members also see the image mirrored left to right; for classes that a mirror image keeps.
        shift: Pixels by which members also see each of these moved, zeros where it leaves, or 0.

    Raises:
        InputError: if there is no member, `passes` is below one, or `shift` below zero.

    Examples:
        >>> from bitquorum.conversion import Policy
        >>> float_network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> ensemble = Ensemble.build([float_network] * 2, [Policy(weight_bits=2), None])
        >>> with rng.draw([1, 2, 3]):
        ...     ensemble(torch.rand(5, 1, 2, 2)).shape
        torch.Size([3, 2, 5, 3])
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        aggregation: Aggregation | None = None,
        passes: int = 1,
        mirrored: bool = False,
        shift: int = 0,
    ) -> None:
        super().__init__()
        if not members:
            raise InputError("expected at least one member, got none")
        if passes < 1:
            raise InputError(f"expected at least one pass per prediction, got {passes}")
        if shift < 0:
            raise InputError(f"expected a shift of at least 0 pixels, got {shift}")
        self.members = nn.ModuleList(members)
        self.aggregation = aggregation or MeanProbability()
        self.passes = passes
        self.mirrored = mirrored
        self.shift = shift
        set_addresses(self)

    @classmethod
    def build(
        cls,
        networks: Sequence[nn.Module],
        policies: Sequence[Conversion | None],
        *,
        shared: bool = False,
        aggregation: Aggregation | None = None,
        passes: int = 1,
        mirrored: bool = False,
        shift: int = 0,
    ) -> "Ensemble":
        """Convert one network per policy and make them an ensemble.

        Args:
            networks: Float networks, one per policy.
            policies: One per member, a `Policy` or another conversion; `None` for a full-precision member.
            shared: Whether all members train one set of full-precision weights, that of the first network. Ranges,
                steps and normalization layers stay apart (the patent's variant, US 2024/0062042 A1).
            aggregation: How a prediction is made.
            passes: Number of draws that one prediction averages over.
            mirrored: Whether members also see the image mirrored left to right.
            shift: Pixels by which members also see each of these moved, or 0.

        Raises:
            InputError: if there are not as many policies as networks.
        """
        if len(networks) != len(policies):
            raise InputError(
                f"expected one network for each policy, got {len(networks)} networks and {len(policies)} policies"
            )
        members = [
            copy.deepcopy(network) if policy is None else policy(network)
            for network, policy in zip(networks, policies, strict=True)
        ]
        if shared:
            share_weights(members)
        return cls(members, aggregation=aggregation, passes=passes, mirrored=mirrored, shift=shift)

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw member batch classes"]:
        """Return the logits of every member under every ambient draw, one look after the other."""
        looks = self.looks(images)
        return torch.stack([answer for look in looks for answer in self.each([look] * len(self.members))], 1)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"aggregation={self.aggregation}, passes={self.passes}, mirrored={self.mirrored}, shift={self.shift}"

    def looks(self, images: Float[Tensor, "batch *image"]) -> tuple[Float[Tensor, "batch *image"], ...]:
        """Return the images as every member sees them: in training as they are, else mirrored and shifted too.

        Raises:
            InputError: if those of a mirrored or shifted ensemble are no images, or too small to be shifted.
        """
        if self._looks == 1:
            return (images,)
        if images.dim() != 4 or self.shift >= min(images.shape[2:]):
            raise InputError(
                "expected images [batch, channels, height, width] of a mirrored or shifted ensemble, larger than its "
                f"shift of {self.shift}, got {list(images.shape)}"
            )
        looks = (images, images.flip(-1)) if self.mirrored else (images,)
        n = self.shift
        return (*looks, *(pad(look, (n, -n, n, -n)) for look in looks)) if n else looks

    @property
    def answers(self) -> int:
        """Number of members that `forward` has, in the mode that it is in: one for each look of each member."""
        return len(self.members) * self._looks

    @property
    def _looks(self) -> int:
        return 1 if self.training else (1 + self.mirrored) * (1 + (self.shift > 0))

    def each(self, images: Sequence[Float[Tensor, "batch *image"]]) -> list[Float[Tensor, "draw batch classes"]]:
        """Return the logits of each member on images of its own, under every ambient draw.

        Raises:
            InputError: if a member returns no logits, or members know different numbers of classes.
        """
        count = self._draws()
        answers = [_under_draws(member, x, count) for member, x in zip(self.members, images, strict=True)]
        if len({answer.shape[-1] for answer in answers}) > 1:
            classes = [answer.shape[-1] for answer in answers]
            raise InputError(f"expected members of equally many classes, got {classes}")
        return answers

    def outputs(self, images: Float[Tensor, "batch *image"]) -> Outputs:
        """Return logits and the input of each member's last linear layer, its penultimate features.

        The logits stand for them where a member has no linear layer, or calls its last one otherwise than once for each
        image.
        """
        answers: list[Tensor] = []
        seen: list[list[Tensor]] = []
        for look in self.looks(images):
            with ExitStack() as stack:
                for member in self.members:
                    seen.append([])
                    with suppress(InputError):
                        heads = [classifier(network) for network in alternatives(member)]
                        stack.enter_context(_record_inputs(heads, seen[-1]))
                answers += self.each([look] * len(self.members))
        features = tuple(_features(into, answer) for into, answer in zip(seen, answers, strict=True))
        return Outputs(parts=tuple(answers), features=features)

    @property
    def stochastic(self) -> bool:
        """Whether two draws can differ."""
        return any(is_stochastic(member) for member in self.members)

    def predict(self, logits: Float[Tensor, "draw member batch classes"]) -> Int[Tensor, "prediction batch"]:
        """Return the predicted classes; each prediction consumes `passes` draws.

        Where logits behind a prediction give no probabilities, it is -1, which is no class: an attack that leads there
        has succeeded.
        """
        return torch.stack([answered(self.aggregation, part) for part in logits.split(self.passes)])

    @staticmethod
    def _draws() -> int:
        ambient = rng.current()
        return len(ambient.seeds) if ambient else 1


def unanswered(logits: Float[Tensor, "draw member batch classes"]) -> Bool[Tensor, "batch"]:
    """Return for which images some logits give no probabilities: the largest is NaN or infinite."""
    return ~logits.amax(-1).isfinite().flatten(0, 1).all(0)


def answered(aggregation: Aggregation, logits: Float[Tensor, "draw member batch classes"]) -> Int[Tensor, "batch"]:
    """Return the class of one prediction by all draws, -1 where logits give no probabilities."""
    return aggregation(logits).argmax(-1).masked_fill(unanswered(logits), -1)


def check_recorded(images: Tensor, model: object) -> None:
    """Refuse what torch cannot differentiate: inference mode would make every gradient zero without a word.

    Raises:
        InputError: inside of `torch.inference_mode`, and for images or weights made there.
    """
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    if torch.is_inference_mode_enabled() or images.is_inference() or any(weight.is_inference() for weight in weights):
        raise InputError(
            "expected a call, images and weights outside of torch.inference_mode, which knows no gradients for an "
            "attack to follow; leave it, and clone what was made inside"
        )


def check_labels(labels: Int[Tensor, "images"], classes: int) -> None:
    """Refuse labels that are none of the classes.

    Raises:
        InputError: if there are such.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"expected labels from 0 to {classes - 1}, the model's classes, got {int(labels.min())} to "
            f"{int(labels.max())}"
        )


def classifier(member: nn.Module) -> nn.Module:
    """Return the last linear layer of a member, with its quantizer where it has one."""
    inner = {id(module.layer) for module in member.modules() if isinstance(module, QuantLayer)}
    found = [
        module
        for module in member.modules()
        if (isinstance(module, nn.Linear) and id(module) not in inner)
        or (isinstance(module, QuantLayer) and isinstance(module.layer, nn.Linear))
    ]
    if not found:
        raise InputError(
            f"expected a member with a linear layer before its logits, got {type(member).__name__}; features need one"
        )
    return found[-1]


def _features(inputs: list[Tensor], logits: Float[Tensor, "draw batch classes"]) -> Float[Tensor, "rows *features"]:
    """Return what a last layer was given, in one call or one for each draw, once for every draw of every image."""
    draws, batch, _ = logits.shape
    rows = sum(len(z) for z in inputs)
    if rows == draws * batch:
        return inputs[0] if len(inputs) == 1 else torch.cat(inputs)
    if rows == batch and len(inputs) == 1:
        return inputs[0].repeat(draws, *[1] * (inputs[0].dim() - 1))
    return logits.flatten(0, 1)


def _under_draws(
    member: nn.Module, x: Float[Tensor, "batch *image"], count: int
) -> Float[Tensor, "draw batch classes"]:
    """Return a member's logits under so many draws; in a plain sequence they share what comes before the first noise.

    Not so in training, where norm layers count rows, nor where hooks expect the sequence itself to be called.
    """
    whole = member.training or type(member) is not nn.Sequential or member._forward_hooks or member._forward_pre_hooks
    parts = [member] if whole or count == 1 else [*cast(nn.Sequential, member)]
    first = next((place for place, part in enumerate(parts) if is_stochastic(part)), len(parts))
    rows = len(x)
    for part in parts[:first]:
        x = part(x)
    if first == len(parts):
        return _checked(x, rows).expand(count, -1, -1)
    x = x if count == 1 else _repeat(x, count)
    for part in parts[first:]:
        x = part(x)
    return _checked(x, count * rows).unflatten(0, (count, -1))


def _checked(logits: Any, rows: int) -> Float[Tensor, "rows classes"]:
    if isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == rows:
        return logits
    found = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise InputError(
        f"expected logits [{rows}, classes] from every member, got {found}; have the network return its logits alone"
    )


def _repeat(x: Float[Tensor, "batch *rest"], count: int) -> Float[Tensor, "draws *rest"]:
    """Return the rows of a batch `count` times over, in their memory order; the gradient is one sum."""
    flat = kernels.flatten(x, 1)
    return kernels.unflatten(flat.expand(count, *flat.shape).flatten(0, 1), x, 1)


@contextmanager
def _record_inputs(modules: Sequence[nn.Module], into: list[Tensor]) -> Iterator[None]:
    hooks = [module.register_forward_pre_hook(lambda _, args: into.append(args[0])) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
