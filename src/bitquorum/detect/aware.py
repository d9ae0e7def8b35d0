"""Attack an ensemble together with the detector that guards it."""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum.attacks import AttackResult, Kind, Problem, pooled_loss
from bitquorum.attacks.apgd import wrong_classes
from bitquorum.attacks.base import check_inputs, error_margin, targeted_loss
from bitquorum.detect.calibration import Detector, has_pairs
from bitquorum.ensemble import answered
from bitquorum.geometry import Norm, per_example
from bitquorum.interface import Cost, InputError, Method, Model
from bitquorum.quantizers import Surrogate


@final
@dataclass(frozen=True, kw_only=True)
class Evasive(Method):
    r"""Find images within epsilon that an ensemble gets wrong and its detector does not reject.

    $$\max_x \; \mathrm{margin}(x) - w \left[ \frac{s(x) - \tau}{\sigma} + \kappa \right]_+$$

    with the detector's differentiable stand-in s, raised by what its mean over the owner's number of draws exceeds that
    over `eot` (`InputStatistic.reached`), threshold $\tau$ and scale $\sigma$, and the attack's `slack`
    $\kappa$. The first climb goes up the margin of the mean probability; the further ones towards each of the `targets`
    likeliest wrong classes, by the mean cross-entropy of every view to it: once all views agree on a wrong class, what
    measures disagreement sees nothing. Each climb has `rounds`, each beginning where the one before ended, with a
    weight w of its own for every example: zero at first, higher where the end is wrong but rejected, lower where it is
    accepted but right; by factors of `factor`, then by halving the interval of logarithms.

    An end is judged as the detector's owner would, on `looks` predictions of `passes` fresh draws each, by the hard
    statistic. Of each example the version is kept that is wrong and accepted in most of them, else wrong in most, else
    of the largest margin. Steps shrink linearly and add up to 2.5 epsilon.

    References: Carlini and Wagner, 2017, https://arxiv.org/abs/1705.07263, section 4 (a loss of both goals); Tramer et
    al., 2020, https://arxiv.org/abs/2002.08347, section 2 (adaptive attacks). Deviations: the weight is searched for
    each example; gradients average over draws; the hinge keeps a distance from the threshold.

    It is no `Attack`, since it needs a detector; otherwise it is called like one.

    Attributes:
        steps: Number of steps of each round.
        eot: Number of fresh draws that each step averages over; at least two for a statistic of one member's draws.
        rounds: Number of weights tried in each climb.
        targets: Number of wrong classes climbed to.
        momentum: Decay of the accumulated L1-normalized gradient.
        slack: Distance below the threshold that is aimed at, in units of the detector's scale.
        factor: By which a weight grows or shrinks, above one.
        looks: Number of predictions that judge an end.
        surrogate: Backward pass that the quantizers show.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> Evasive(steps=10, targets=1).label
        'Evasive-10x2 r4 t1'
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    kind: ClassVar[Kind] = "white-box"

    steps: int = 20
    eot: int = 2
    rounds: int = 4
    targets: int = 2
    momentum: float = 0.75
    slack: float = 0.5
    factor: float = 4.0
    looks: int = 3
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("steps", "eot", "rounds", "looks")}
        if min(counts.values()) < 1 or self.targets < 0:
            raise InputError(f"expected at least one of each and targets of at least 0, got {counts}, {self.targets}")
        if not (0 <= self.momentum < 10 and self.slack >= 0 and self.factor > 1):
            raise InputError(
                "expected a momentum in [0, 10), a slack of at least 0 and a factor above one, got "
                f"{self.momentum}, {self.slack} and {self.factor}"
            )

    @property
    def label(self) -> str:
        """Return the name for tables, with the budget."""
        targets = f" t{self.targets}" if self.targets else ""
        parts = (f"Evasive-{self.steps}x{self.eot} r{self.rounds}{targets}", self.surrogate.label)
        return " ".join(part for part in parts if part)

    def __call__(
        self,
        model: Model,
        images: Float[Tensor, "batch *image"],
        labels: Int[Tensor, "batch"],
        *,
        epsilon: float,
        detector: Detector,
        examples: Int[Tensor, "batch"] | None = None,
        seed: int = 0,
        norm: Norm = "linf",
    ) -> AttackResult:
        """Attack a batch; arguments and errors are those of `Attack`, and `detector` is what is to be evaded.

        Raises:
            InputError: also if a step has a single view, where the statistic compares views.
        """
        check_inputs(images, labels, epsilon, norm)
        if norm not in self.norms:
            raise InputError(f"expected a norm of {self.label} among {', '.join(self.norms)}, got {norm!r}")
        if epsilon == 0:
            return AttackResult(images=images.clone(), cost=Cost())
        problem = Problem(
            model=model,
            images=images.detach(),
            labels=labels,
            epsilon=epsilon,
            examples=torch.arange(len(images), device=images.device) if examples is None else examples,
            seed=seed,
            norm=norm,
        )
        return AttackResult(images=self._run(problem, detector), cost=problem.meter.cost)

    def _run(self, problem: Problem, detector: Detector) -> Float[Tensor, "batch *image"]:
        best = self._judge(problem, detector, problem.images)
        found = problem.images.clone()
        ranked = wrong_classes(problem, draws=detector.passes)[: self.targets] if self.targets else ()
        for climb, targets in enumerate((None, *ranked)):
            x, weights = problem.random_point("climb", climb), _Weights.start(best.rank)
            for number in range(self.rounds):
                path = problem.child("climb", climb, "round", number)
                x = self._climb(path, detector, x, weights.weight, targets)
                end = self._judge(problem, detector, x)
                better = best.take(end)
                found[better] = x[better]
                weights.update(raised=end.wrong & ~end.accepted, lowered=end.accepted & ~end.wrong, by=self.factor)
        return found

    def _climb(
        self,
        problem: Problem,
        detector: Detector,
        x: Float[Tensor, "batch *image"],
        weight: Float[Tensor, "batch"],
        targets: Int[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch *image"]:
        """Return the end of one climb under given weights, untargeted or towards a class."""
        labels = problem.labels

        def criterion(logits: Tensor) -> Tensor:
            if not has_pairs(detector.statistic, logits):
                raise InputError(
                    f"expected an eot of at least 2 against {detector.statistic.name} of one member, got 1"
                )
            if targets is None:
                goal = pooled_loss(logits, labels, loss="margin", pooling="mean-probability")
            else:
                goal = targeted_loss(logits, labels, targets, loss="cross-entropy", pooling="mean-member-loss")
            views, reached = logits.shape[0] * logits.shape[1], detector.statistic.reached
            grown = reached(detector.passes * logits.shape[1]) / reached(views)
            excess = grown * detector.statistic.smooth(logits, detector.reference) - detector.threshold
            return goal - weight * (excess / detector.scale + self.slack).clamp(min=0)

        velocity = torch.zeros_like(x)
        for step in range(self.steps):
            seeds = problem.seeds(self.eot, "step", step)
            gradient, _ = problem.gradient(x, criterion, seeds=seeds, surrogate=self.surrogate)
            gradient = gradient / per_example(gradient.abs().flatten(1).mean(1).clamp(min=1e-30), gradient)
            velocity = self.momentum * velocity + gradient
            length = 5 * problem.epsilon * (self.steps - step) / (self.steps * (self.steps + 1))
            x = problem.ascend(x, velocity, length)
        return x

    def _judge(self, problem: Problem, detector: Detector, x: Float[Tensor, "batch *image"]) -> "_Verdict":
        """Return what the owner of the detector would see; the draws are the same for every version of an example."""
        parts = [
            problem.logits(x, seeds=problem.seeds(detector.passes, "selection", look)) for look in range(self.looks)
        ]
        wrong = torch.stack([answered(detector.aggregation, part) != problem.labels for part in parts])
        scores = torch.stack([detector.scores(part) for part in parts])
        accepted = scores <= detector.threshold
        margin = error_margin(torch.cat(parts), problem.labels)
        room = (detector.threshold - scores.mean(0)) / detector.scale
        both = (wrong & accepted).sum(0)
        return _Verdict(
            rank=both * (self.looks + 1) + wrong.sum(0),
            tie=torch.where(both > 0, torch.minimum(margin, room), margin),
            wrong=2 * wrong.sum(0) > self.looks,
            accepted=2 * accepted.sum(0) > self.looks,
        )


@dataclass(kw_only=True, eq=False)
class _Verdict:
    """Hold how good a version of each example is: by rank, then by tie; and whether most looks erred or accepted."""

    rank: Int[Tensor, "batch"]
    tie: Float[Tensor, "batch"]
    wrong: Bool[Tensor, "batch"]
    accepted: Bool[Tensor, "batch"]

    def take(self, other: "_Verdict") -> Bool[Tensor, "batch"]:
        """Keep the rank and tie of what is better, and return where it was."""
        better = (other.rank > self.rank) | ((other.rank == self.rank) & (other.tie > self.tie))
        self.rank, self.tie = torch.where(better, other.rank, self.rank), torch.where(better, other.tie, self.tie)
        return better


@dataclass(kw_only=True, eq=False)
class _Weights:
    """Search the weight of each example between one that was too low and one that was too high."""

    weight: Float[Tensor, "batch"]
    low: Float[Tensor, "batch"]
    high: Float[Tensor, "batch"]

    @classmethod
    def start(cls, like: Int[Tensor, "batch"]) -> "_Weights":
        """Return weights of zero without bounds."""
        zero = torch.zeros(like.shape, device=like.device)
        return cls(weight=zero, low=zero.clone(), high=torch.full_like(zero, torch.inf))

    def update(self, *, raised: Bool[Tensor, "batch"], lowered: Bool[Tensor, "batch"], by: float) -> None:
        """Move the weights of some examples; a weight of zero cannot fall."""
        weight = self.weight
        lowered = lowered & (weight > 0)
        self.low, self.high = torch.where(raised, weight, self.low), torch.where(lowered, weight, self.high)
        between = (self.low * self.high).sqrt()
        above = torch.where(self.high.isinf(), (weight * by).clamp(min=1.0), self.high / by)
        up, down = (torch.where((self.low > 0) & self.high.isfinite(), between, edge) for edge in (above, weight / by))
        self.weight = torch.where(raised, up, torch.where(lowered, down, weight))
