"""Define what an attack is, the problem that it solves, and the loss that it climbs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import kernels, rng
from bitquorum.ensemble import Aggregation, MeanProbability, answered, check_recorded
from bitquorum.geometry import Norm, ascend, project, random_point
from bitquorum.interface import Cost, InputError, Method, Model
from bitquorum.quantizers import Surrogate

Loss = Literal["cross-entropy", "margin", "dlr", "scaled-cross-entropy"]
Pooling = Literal["mean-loss", "mean-probability", "mean-logits", "mean-member-loss", "least-member-loss"]
Kind = Literal["none", "white-box", "transfer", "gradient-free"]
Criterion = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttackResult:
    """Hold adversarial images in [0, 1] and the passes spent on each image."""

    images: Float[Tensor, "batch *image"]
    cost: Cost


class Meter:
    """Count the passes that each image of a batch has taken so far."""

    def __init__(self) -> None:
        self.cost = Cost()

    def add(self, *, forward: int = 0, backward: int = 0) -> None:
        """Add passes over the whole batch."""
        self.cost = self.cost + Cost(forward=forward, backward=backward)


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Hold what an attack is to solve, and ask the model: every pass goes through here and is counted.

    Attributes:
        model: Callable from images to logits `[draw, member, batch, classes]`, random only through `rng.draw`.
        images: In [0, 1].
        labels: True classes.
        epsilon: Radius, in units of the image.
        examples: Identity of each example, for its noise.
        seed: Of the attack's own random numbers and of the draws it averages over.
        norm: `linf` or `l2`.
        criterion: The caller's loss in place of the attack's own.
        sources: Other models that the attacker holds, by name.
        at_once: Number of images that may be asked in one pass, where an attack has several versions of each.
        meter: Counts passes of `model`; passes of `sources` count alike.
    """

    model: Model
    images: Float[Tensor, "batch *image"]
    labels: Int[Tensor, "batch"]
    epsilon: float
    examples: Int[Tensor, "batch"]
    seed: int = 0
    norm: Norm = "linf"
    criterion: Criterion | None = None
    sources: Mapping[str, Model] = field(default_factory=dict)
    at_once: int = 0
    meter: Meter = field(default_factory=Meter)

    def child(self, *path: int | str) -> "Problem":
        """Return the same problem with a seed of its own, for a restart or a stage; passes count together."""
        return replace(self, seed=rng.derive(self.seed, *path))

    def towards(
        self,
        ranked: Int[Tensor, "rank batch"],
        search: Callable[["Problem", Criterion], Tensor],
        *,
        loss: Loss,
        pooling: Pooling,
    ) -> Iterator[Float[Tensor, "batch *image"]]:
        """Yield what `search` finds for each row of target classes, as many rows in one batch as `at_once` allows.

        It climbs `targeted_loss`. The rows share their draws, so that it does not matter how many are solved together.
        A caller's criterion knows no target and each image once: each row then has draws of its own, and a batch of
        its own.
        """
        together = 1 if self.criterion else max(1, self.at_once // max(1, len(self.images)))
        for number, targets in enumerate(ranked.split(together)):
            count, meter = len(targets), Meter()
            several = replace(
                self.child("target", number) if self.criterion else self,
                images=torch.cat([self.images] * count),
                labels=torch.cat([self.labels] * count),
                examples=torch.cat([self.examples] * count),
                meter=meter,
            )
            criterion = self.criterion or partial(
                targeted_loss, labels=several.labels, targets=targets.flatten(), loss=loss, pooling=pooling
            )
            found = search(several, criterion)
            self.meter.add(forward=count * meter.cost.forward, backward=count * meter.cost.backward)
            yield from found.unflatten(0, (count, len(self.images)))

    def seeds(self, count: int, *path: int | str) -> list[int]:
        """Return seeds of `count` draws; the first n do not depend on `count`."""
        return rng.derive_many(self.seed, count, *path)

    def gradient(
        self,
        x: Float[Tensor, "batch *image"],
        criterion: Criterion,
        *,
        seeds: Sequence[int],
        surrogate: Surrogate | None = None,
    ) -> tuple[Float[Tensor, "batch *image"], Float[Tensor, "batch"]]:
        """Return the gradient at `x` of each example's loss over the given draws, and the loss."""
        self.meter.add(forward=len(seeds), backward=len(seeds))
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), rng.draw(seeds, self.examples), (surrogate or Surrogate())():
            loss = criterion(self._asked(leaf))
            if not loss.requires_grad:  # no path leads back to the image: an honest zero, which self-checks report
                return torch.zeros_like(leaf), loss.detach()
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
        if gradient is None:
            return torch.zeros_like(leaf), loss.detach()
        return gradient.nan_to_num(0.0, 0.0, 0.0), loss.detach()  # such as that of a root at a black pixel

    def loss(
        self, x: Float[Tensor, "batch *image"], criterion: Criterion, *, seeds: Sequence[int]
    ) -> Float[Tensor, "batch"]:
        """Return each example's loss at `x` over the given draws."""
        return criterion(self.logits(x, seeds=seeds))

    @torch.no_grad()
    def logits(
        self, x: Float[Tensor, "batch *image"], *, seeds: Sequence[int]
    ) -> Float[Tensor, "draw member batch classes"]:
        """Return the logits at `x` under the given draws."""
        self.meter.add(forward=len(seeds))
        with rng.draw(seeds, self.examples):
            return self._asked(x)

    def _asked(self, x: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw member batch classes"]:
        logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 4:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"expected logits [draw, member, batch, classes] of the model, got {shape}; make a plain module one by "
                "`bitquorum.wrap(module, images)`, or `bitquorum.Ensemble([module])` of a network of ours"
            )
        return kernels.wide(logits)

    def project(self, x: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch *image"]:
        """Return the point of the ball within [0, 1] that belongs to `x`."""
        return project(x, self.images, self.epsilon, self.norm)

    def random_point(self, *path: int | str) -> Float[Tensor, "batch *image"]:
        """Return a random point of the ball within [0, 1]."""
        seed = rng.derive(self.seed, *path)
        return random_point(self.images, self.epsilon, self.norm, seed=seed, examples=self.examples)

    def ascend(
        self, x: Float[Tensor, "batch *image"], gradient: Float[Tensor, "batch *image"], length: float | Tensor
    ) -> Float[Tensor, "batch *image"]:
        """Return the projected step of the given length (a number, or one for each example) in steepest ascent."""
        return self.project(ascend(x, gradient, length, self.norm))

    @property
    def goal(self) -> Criterion:
        """What is positive where the model errs, see `error_margin`; the caller's loss in its place.

        Of a model that aggregates otherwise than by the mean probability it is `error_share`.
        """
        aggregation = getattr(self.model, "aggregation", None)
        if self.criterion or not isinstance(aggregation, Aggregation) or isinstance(aggregation, MeanProbability):
            return self.criterion or partial(error_margin, labels=self.labels)
        return partial(error_share, labels=self.labels, aggregation=aggregation)

    def best(
        self, candidates: Iterable[Float[Tensor, "batch *image"]], criterion: Criterion, *, draws: int
    ) -> Float[Tensor, "batch *image"]:
        """Return, for each example, the candidate of the largest loss on common fresh draws.

        A single candidate costs no draw.
        """
        seeds = self.seeds(draws, "selection")
        found: Tensor | None = None
        value: Tensor | None = None
        for candidate in candidates:
            if found is None:
                found = candidate.clone()
                continue
            if value is None:
                value = self.loss(found, criterion, seeds=seeds)
            other = self.loss(candidate, criterion, seeds=seeds)
            better = exceeds(other, value)
            found[better], value = candidate[better], torch.where(better, other, value)
        if found is None:
            raise InputError("expected at least one candidate, got none")
        return found


def exceeds(new: Float[Tensor, "batch"], old: Float[Tensor, "batch"]) -> Bool[Tensor, "batch"]:
    """Return where a loss is larger than another; any number exceeds NaN, which would else stand for ever.

    Examples:
        >>> exceeds(torch.tensor([1.0, 1.0, torch.nan]), torch.tensor([0.0, torch.nan, 1.0])).tolist()
        [True, True, False]
    """
    return (new > old) | (old.isnan() & ~new.isnan())


class Witness:
    """Climb one loss, and note how near the same passes come to the goal: being wrong, whatever the class.

    Args:
        criterion: The loss.
        goal: Of the same logits; its last value is kept.
    """

    def __init__(self, criterion: Criterion, goal: Criterion) -> None:
        self.criterion, self.goal = criterion, goal
        self.value = torch.empty(0)

    def __call__(self, logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch"]:
        """Return the loss."""
        loss = self.criterion(logits)
        self.value = loss.detach() if self.goal is self.criterion else self.goal(logits.detach())
        return loss


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """Find images within `epsilon` of the given ones that a model gets wrong.

    An attack knows everything but the draws on which it will be judged. Equal seeds and examples
    give the same images, whatever the batch. `norms` are those that it has; `kind` says what the attacker uses.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf",)
    kind: ClassVar[Kind] = "white-box"

    @property
    @abstractmethod
    def label(self) -> str:
        """Return the name for tables, with the budget."""

    def __call__(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        labels: Int[Tensor, "batch"],
        *,
        epsilon: float,
        examples: Int[Tensor, "batch"] | None = None,
        seed: int = 0,
        norm: Norm = "linf",
        criterion: Criterion | None = None,
        sources: Mapping[str, Model] | None = None,
        at_once: int = 0,
    ) -> AttackResult:
        """Attack a batch.

        Args:
            model: Callable from images to logits `[draw, member, batch, classes]`, random only through `rng.draw`.
            images: In [0, 1].
            labels: True classes.
            epsilon: Radius of the ball, in units of the image (5/255 is 0.0196).
            examples: Identity of each example; its place in the batch by default.
            seed: Of the attack's own random numbers and of the draws it averages over.
            norm: `linf`, the maximum norm, or `l2`, where the attack has it.
            criterion: Loss per example `[batch]` of logits `[draw, member, batch, classes]`, to be raised, in place
                of the attack's own.
            sources: Other models that the attacker holds, for attacks that name one.
            at_once: Number of images that one pass may ask, for attacks that have several versions of each, such as
                one for every target: it changes the time, and results by rounding alone. A smaller number than the
                batch asks about one version of each.

        Raises:
            InputError: for images outside [0, 1] or not finite, labels of the wrong shape, a negative epsilon, a norm
                that the attack does not have, inside of `torch.inference_mode`, and for a model of other outputs.
        """
        check_inputs(images, labels, epsilon, norm)
        check_recorded(images, model)
        if norm not in self.norms:
            raise InputError(f"expected a norm of {self.label} among {', '.join(self.norms)}, got {norm!r}")
        if examples is None:
            examples = torch.arange(len(images), device=images.device)
        if epsilon == 0:
            return AttackResult(images=images.clone(), cost=Cost())
        problem = Problem(
            model=model,
            images=images.detach(),
            labels=labels,
            epsilon=epsilon,
            examples=examples,
            seed=seed,
            norm=norm,
            criterion=criterion,
            sources={} if sources is None else sources,
            at_once=at_once,
        )
        return AttackResult(images=self._run(problem), cost=problem.meter.cost)

    @abstractmethod
    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        """Return adversarial images of a checked problem."""


def pooled_loss(
    logits: Float[Tensor, "draw member batch classes"],
    labels: Int[Tensor, "batch"],
    *,
    loss: Loss,
    pooling: Pooling,
) -> Float[Tensor, "batch"]:
    r"""Return the loss of each example, pooled over draws and members.

    Poolings:

    - `mean-loss`: the mean over draws of the loss of the members' mean probability (EOT as the mean of loss gradients).
    - `mean-probability`: the loss of the probability averaged over draws and members.
    - `mean-logits`: the mean over draws of the loss of the members' mean logits.
    - `mean-member-loss`: the mean over draws and members of each one's own loss.
    - `least-member-loss`: the mean over draws of the least loss among members: that of the one hardest to fool.

    Losses of a view with log-probabilities z, true class y and order statistics $z_{(1)} \ge z_{(2)} \ge \dots$:

    - `cross-entropy`: $-z_y$.
    - `margin`: $\max_{c \ne y} z_c - z_y$ (Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644).
    - `dlr`: the margin over $z_{(1)} - z_{(3)}$; no scale of the logits changes it (Croce and Hein, 2020,
      https://arxiv.org/abs/2003.01690, eq. 6). With two classes it is the margin: over $z_{(1)} - z_{(2)}$ it would be
      constant.
    - `scaled-cross-entropy`: cross-entropy after division of each example's z by a temperature, its spread
      $z_{(1)} - z_{(2)}$ where that exceeds one, held constant: huge logits do not flatten it.
    """
    return pool(logits, pooling, lambda views: view_loss(views, labels, loss))


def error_margin(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """Return the margin of the mean probability, and just above zero for a tie that the first of its classes wins.

    Scores that saturate can be led to a tie, and no further; the largest score of the lowest index is the prediction.
    Where logits give no probabilities the model has no answer: the margin is infinite.

    Examples:
        >>> logits = torch.tensor([[[[1.0, 1.0, 0.0]]]])
        >>> float(error_margin(logits, torch.tensor([0]))), float(error_margin(logits, torch.tensor([1]))) > 0
        (0.0, True)
    """
    score = pooled_score(logits)
    margin = view_loss(score[None], labels, "margin")[0]
    tie = (margin == 0) & (score.argmax(-1) != labels)
    return torch.where(tie, torch.finfo(margin.dtype).tiny, margin).nan_to_num(torch.inf, torch.inf, -torch.inf)


def error_share(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"], aggregation: Aggregation
) -> Float[Tensor, "batch"]:
    """Return the share of draws whose prediction errs less one half, plus what orders equal shares.

    The latter grows with `error_margin` and is less than half a draw.

    Examples:
        >>> from bitquorum.ensemble import MajorityVote
        >>> logits = torch.tensor([[[[9.0, 0.0]], [[0.0, 0.1]], [[0.0, 0.1]]]])
        >>> float(error_margin(logits, torch.tensor([0]))) > 0  # the mean probability is right
        False
        >>> float(error_share(logits, torch.tensor([0]), MajorityVote())) > 0  # two of three vote for the other class
        True
    """
    wrong = torch.stack([answered(aggregation, draw) != labels for draw in logits.split(1)])
    margin = error_margin(logits, labels)
    return wrong.to(margin.dtype).mean(0) - 0.5 + margin.tanh() / (2 * len(logits))


def pooled_score(logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "batch classes"]:
    """Return the logarithm of the probability averaged over draws and members."""
    logp = logits.log_softmax(-1).flatten(0, 1)
    return logp[0] if len(logp) == 1 else logp.logsumexp(0) - math.log(len(logp))


def targeted_loss(
    logits: Float[Tensor, "draw member batch classes"],
    labels: Int[Tensor, "batch"],
    targets: Int[Tensor, "batch"],
    *,
    loss: Loss,
    pooling: Pooling,
) -> Float[Tensor, "batch"]:
    r"""Return the loss of each example that rises as the model takes it for the target class.

    Poolings are those of `pooled_loss`. Losses of a view z with target t: the negative cross-entropies to t, the
    `margin` $z_t - z_y$, and `dlr`, the margin over $z_{(1)} - (z_{(3)} + z_{(4)}) / 2$ (Croce and Hein, 2020,
    https://arxiv.org/abs/2003.01690, eq. 7), where missing order statistics are left out; with two classes the margin.
    """

    def of_view(views: Tensor) -> Tensor:
        if loss.endswith("cross-entropy"):
            return -view_loss(views, targets, loss)
        margin = _take(views, targets) - _take(views, labels)
        if loss == "margin" or views.shape[-1] < 3:
            return margin
        top = views.topk(min(4, views.shape[-1]), -1).values
        return margin / (top[..., 0] - top[..., 2:].mean(-1)).clamp(min=1e-12)

    return pool(logits, pooling, of_view)


def pool(
    logits: Float[Tensor, "draw member batch classes"], pooling: Pooling, loss: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch"]:
    """Return the mean loss over the views of each example that a pooling makes; see `pooled_loss`."""
    draws, members = logits.shape[:2]
    logp = logits.log_softmax(-1)
    if pooling == "mean-loss":
        return loss(logp.logsumexp(1) - math.log(members)).mean(0)
    if pooling == "mean-probability":
        return loss((logp.flatten(0, 1).logsumexp(0) - math.log(draws * members))[None])[0]
    if pooling == "mean-logits":
        return loss(logits.mean(1).log_softmax(-1)).mean(0)
    values = loss(logp.flatten(0, 1)).unflatten(0, (draws, members))
    return (values.amin(1) if pooling == "least-member-loss" else values.mean(1)).mean(0)


def view_loss(
    views: Float[Tensor, "view batch classes"], labels: Int[Tensor, "batch"], loss: Loss
) -> Float[Tensor, "view batch"]:
    """Return the loss of each view of each example; see `pooled_loss`."""
    if loss == "scaled-cross-entropy":
        top = views.detach().topk(2, -1).values
        views = (views / (top[..., :1] - top[..., 1:]).clamp(min=1.0)).log_softmax(-1)
    true = _take(views, labels)
    if loss.endswith("cross-entropy"):
        return -true
    index = labels.expand(len(views), -1)[..., None]
    margin = views.scatter(-1, index, -torch.inf).amax(-1) - true
    if loss == "margin" or views.shape[-1] < 3:
        return margin
    top = views.topk(3, -1).values
    return margin / (top[..., 0] - top[..., 2]).clamp(min=1e-12)


def _take(views: Float[Tensor, "view batch classes"], classes: Int[Tensor, "batch"]) -> Float[Tensor, "view batch"]:
    return views.gather(-1, classes.expand(len(views), -1)[..., None])[..., 0]


def check_inputs(images: Tensor, labels: Tensor, epsilon: float, norm: Norm = "linf") -> None:
    """Raise `InputError` for inputs that no attack can take."""
    for name, given in (("images", images), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise InputError(f"expected {name} in a torch tensor, got {type(given).__name__}; use torch.as_tensor")
    if not isinstance(epsilon, int | float):
        raise InputError(f"expected epsilon as one number, in units of the image, got {epsilon!r}; write 8 / 255")
    if not images.is_floating_point() or images.dim() < 2:
        raise InputError(
            f"expected a float batch of images [batch, ...], got {images.dtype} of shape {tuple(images.shape)}"
        )
    if not bool(torch.isfinite(images).all()):
        raise InputError("expected finite images, got NaN or infinity; check the data and its preprocessing")
    if len(images) and (float(images.min()) < 0 or float(images.max()) > 1):
        raise InputError(
            f"expected images in [0, 1], got values from {float(images.min()):.4g} to {float(images.max()):.4g}; "
            "divide bytes by 255 and put any normalization into the model"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"expected int64 labels of shape ({len(images)},), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not 0 <= epsilon < math.inf or (norm == "linf" and epsilon > 1):
        interval = "[0, 1]" if norm == "linf" else "[0, inf)"
        raise InputError(f"expected epsilon in {interval}, in units of the image, got {epsilon}")


def check_choices(loss: str, pooling: str) -> None:
    """Raise `InputError` for an unknown loss or pooling."""
    if loss not in get_args(Loss):
        raise InputError(f"expected a loss among {', '.join(get_args(Loss))}, got {loss!r}")
    if pooling not in get_args(Pooling):
        raise InputError(f"expected a pooling among {', '.join(get_args(Pooling))}, got {pooling!r}")
