"""Check the evaluation itself: signs that an accuracy comes from a weak attack and not from a robust model.

Each check decides by a test whose false alarm has a probability of about one in a hundred, or less, and says what it
saw. The list of checks follows Athalye et al., 2018, https://arxiv.org/abs/1802.00420, section 3.1, Carlini et al.,
2019, https://arxiv.org/abs/1902.06705, and Zimmermann et al., 2022, https://arxiv.org/abs/2206.13991.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks import APGD, Attack, Problem, RandomNoise, pooled_loss
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate.ladder import Arena, Climb, Examples, Ladder, is_noisy
from bitquorum.geometry import ascend
from bitquorum.interface import Listener, Model

_ALARM: Final = 0.01  # probability of a false alarm of one check
_NORMAL: Final = 2.6  # standard errors that it corresponds to, on one side, with a reserve
_LEAST: Final = 0.02  # differences in accuracy below this mean nothing


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Say whether a check passed, and why.

    Attributes:
        name: Of the check.
        passed: Whether the accuracy may be believed as far as this check sees; `None` where it could not be posed.
        reason: What was seen, in one sentence.
        facts: The numbers behind it.
    """

    name: str
    passed: bool | None
    reason: str
    facts: dict[str, float] = field(default_factory=dict)


def run_checks(
    model: Model,
    examples: Examples,
    ladder: Ladder,
    climb: Climb,
    *,
    sources: Mapping[str, Model] | None = None,
    shown: Model | None = None,
    listener: Listener | None = None,
) -> list[Verdict]:
    """Check a finished climb.

    Args:
        model: What was judged.
        examples: The images of the climb; the first `ladder.check_images` of them are attacked again.
        ladder: Its rungs are what is checked.
        climb: Its result.
        sources: Other models that the attacker held.
        shown: What the attacks saw in place of the model.
        listener: Hears how many checks are done, and which one begins.
    """
    bench = _Bench.build(model, examples, ladder, climb, sources or {}, shown or model)
    verdicts = []
    for done, (name, check) in enumerate(CHECKS.items()):
        if listener:
            listener.advance(done, f"of {len(CHECKS)}, {name}")
        verdict = check(bench)
        if verdict is not None:
            verdicts.append(verdict)
    return verdicts


@dataclass(frozen=True, kw_only=True, eq=False)
class _Bench:
    """Hold what the checks share: the first images of a climb, ready to be attacked again and judged.

    Attributes:
        arena: Attacks and judges.
        climb: What the ladder left.
        rungs: Those that were climbed, the claim's first.
    """

    arena: Arena
    climb: Climb
    rungs: tuple[Attack, ...]

    @classmethod
    def build(
        cls, model: Model, examples: Examples, ladder: Ladder, climb: Climb, sources: Mapping[str, Model], shown: Model
    ) -> "_Bench":
        few = slice(0, ladder.check_images)
        chosen = Examples(images=examples.images[few], labels=examples.labels[few], index=examples.index[few])
        arena = Arena(model=model, shown=shown, examples=chosen, ladder=ladder, sources=sources)
        return cls(arena=arena, climb=climb, rungs=ladder.rungs_for(model, sources))

    @property
    def images(self) -> int:
        """Number of images that are attacked again."""
        return len(self.arena.examples.labels)

    @property
    def everyone(self) -> Int[Tensor, "images"]:
        """Their positions."""
        return torch.arange(self.images, device=self.arena.examples.labels.device)

    def accuracy(self, attack: Attack, epsilon: float) -> Float[Tensor, "images"]:
        """Return each image's probability of being right, on fresh draws, under one attack."""
        found, _ = self.arena.attack(attack, self.everyone, epsilon)
        return self.arena.judge(found, self.everyone).float().mean(0)

    def draws(self, purpose: str, count: int) -> list[int]:
        """Return seeds of draws for a check."""
        return rng.derive_many(self.arena.ladder.seed, count if is_noisy(self.arena.model) else 1, "check", purpose)

    def problem(self, epsilon: float) -> Problem:
        """Return the attacker's problem on these images."""
        examples, ladder = self.arena.examples, self.arena.ladder
        return Problem(
            model=self.arena.shown,
            images=examples.images,
            labels=examples.labels,
            epsilon=epsilon,
            examples=examples.index,
            seed=rng.derive(ladder.seed, "check"),
            norm=ladder.norm,
            sources=self.arena.sources,
        )


def self_test(bench: _Bench) -> Verdict | None:
    """Ask the rungs for adversarial examples that provably exist (Zimmermann et al., 2022, section 4).

    For each image a corner of the ball is chosen, and the model's last layer is replaced by a linear readout of its
    features, fitted so that the corner, and none of many other points of the ball, is of another class. An attack that
    works finds the corner's side of the boundary, or another way over it. Deviations: the corner, like half of the
    other points, lies in the direction of another image, which moves features further than a random one; a ridge
    regression in place of their logistic one; under noise it is fitted to many draws, the mean over fresh draws decides
    what is adversarial, and images where the noise hides the corner are left out.
    """
    problem = bench.problem(bench.climb.epsilon)
    readout, valid = _readout(bench, problem)
    if int(valid.sum()) < max(4, bench.images // 4):
        reason = f"the noise hides single points of the ball on all but {int(valid.sum())} images"
        return Verdict(name="self-test", passed=None, reason=reason, facts={"images": float(valid.sum())})
    zeros = torch.zeros_like(problem.labels)
    shown = replace(readout, model=bench.arena.shown)
    seeds = bench.draws("self-test", 48)

    def share(attack: Attack) -> Bool[Tensor, "images"]:
        result = attack(
            shown,
            problem.images,
            zeros,
            epsilon=problem.epsilon,
            examples=problem.examples,
            seed=problem.seed,
            norm=problem.norm,
        )
        with torch.no_grad(), rng.draw(seeds, problem.examples):
            score = readout.scores(result.images).mean(0)
        return score > 0

    white = [rung for rung in bench.rungs if rung.kind == "white-box" and _iterates(rung)]
    if not white:
        reason = "the ladder has no white-box rung of more than one step"
        return Verdict(name="self-test", passed=False, reason=reason)
    found = {rung.label: share(rung)[valid] for rung in _distinct(white)}
    chance = share(RandomNoise(tries=10, draws=4))[valid]
    shares = {label: float(hits.float().mean()) for label, hits in found.items()}
    count = int(valid.sum())
    missed = count - int(torch.stack(list(found.values())).any(0).sum())
    weak = [label for label, value in shares.items() if _tail(count, round(count * (1 - value)), 0.05) < _ALARM]
    facts = {**shares, "random points": float(chance.float().mean()), "images": float(count)}
    passed = _tail(count, missed, 0.02) >= _ALARM and bench.rungs[0].label not in weak and len(weak) * 2 < len(found)
    reason = f"of {count} hidden adversarial examples the white-box rungs found {count - missed}"
    reason += f" (random points {int(chance.sum())})"
    if weak:
        reason += "; more than chance were missed by " + ", ".join(weak)
    return Verdict(name="self-test", passed=passed, reason=reason, facts=facts)


def gradients(bench: _Bench) -> Verdict:
    """Ask whether gradients are there, and whether a step along them does more than a random step.

    The step has a quarter of epsilon, or more where most outputs do not move at that. A test of the paired differences
    in the margin, averaged over fresh draws, must prefer the gradient.
    """
    problem = bench.problem(bench.climb.epsilon)
    seeds, judging = bench.draws("gradient", 16), bench.draws("step", 32)

    def margin(logits: Tensor) -> Tensor:
        return pooled_loss(logits, problem.labels, loss="margin", pooling="mean-probability")

    def entropy(logits: Tensor) -> Tensor:
        return pooled_loss(logits, problem.labels, loss="cross-entropy", pooling="mean-loss")

    gradient, _ = problem.gradient(problem.images, margin, seeds=seeds)
    other, _ = problem.gradient(problem.images, entropy, seeds=seeds)
    flat = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    flat_entropy = float((other.flatten(1).abs().amax(1) == 0).float().mean())
    facts = {"zero_gradients": flat, "zero_gradients_of_cross_entropy": flat_entropy}
    if flat > 0.25:
        reason = f"the margin has no gradient at all on {100 * flat:.0f} % of the images"
        return Verdict(name="gradients", passed=False, reason=reason, facts=facts)
    u = [rng.uniform(rng.derive(problem.seed, "random", k), problem.examples, gradient[0].numel()) for k in range(4)]
    for factor in (0.25, 1.0, 4.0):
        length = min(factor * problem.epsilon, 0.5)
        along = _rise(problem, gradient, length, margin, judging)
        random = torch.stack([_rise(problem, (value - 0.5).view_as(gradient), length, margin, judging) for value in u])
        if float(((along != 0) | (random != 0).any(0)).float().mean()) > 0.5:
            break  # outputs that are votes do not move at a short step
    score = _score(along - random.mean(0))
    facts |= {"rise_along_gradient": float(along.mean()), "rise_along_random": float(random.mean()), "step": length}
    passed = score > _NORMAL
    verb = "more than" if passed else "no more than"
    reason = f"a step along the gradient raises the margin {verb} a random one ({score:.1f} standard errors)"
    if flat_entropy > 0.25:
        reason += (
            f"; cross-entropy has no gradient on {100 * flat_entropy:.0f} % of the images, its accuracies mean nothing"
        )
    return Verdict(name="gradients", passed=passed, reason=reason, facts=facts)


def large_radius(bench: _Bench) -> Verdict | None:
    """Ask whether the accuracy falls to zero at radius 1/2, where every image can be made grey (maximum norm only)."""
    if bench.arena.ladder.norm != "linf":
        return None
    rungs = [bench.rungs[0], next((rung for rung in bench.rungs if isinstance(rung, APGD)), APGD())]
    left = torch.stack([bench.accuracy(rung, 0.5) for rung in rungs]).amin(0)
    right = int((left > 0.5).sum())
    facts = {"accuracy": float(left.mean()), "images": float(bench.images)}
    passed = _tail(bench.images, right, 0.05) >= _ALARM and float(left.mean()) < 0.25
    reason = f"at radius 1/2, where every image can be made grey, {100 * float(left.mean()):.1f} % are still right"
    return Verdict(name="large radius", passed=passed, reason=reason, facts=facts)


def frozen_draw(bench: _Bench) -> Verdict | None:
    """Ask whether knowing the draw helps: the same attack against one fixed draw, judged on that draw."""
    if not is_noisy(bench.arena.model):
        return None
    claim, epsilon = bench.rungs[0], bench.climb.epsilon
    passes = bench.arena.model.passes
    frozen = _Frozen(model=bench.arena.model, seeds=tuple(bench.draws("frozen", passes)))
    shown = _Frozen(model=bench.arena.shown, seeds=frozen.seeds)
    attack = _with(claim, eot=1)
    examples = bench.arena.examples
    left = torch.ones(bench.images, dtype=torch.bool, device=examples.labels.device)
    for rung in (attack, APGD(steps=20, loss="margin")):
        result = rung(
            shown,
            examples.images,
            examples.labels,
            epsilon=epsilon,
            examples=examples.index,
            norm=bench.arena.ladder.norm,
        )
        with torch.no_grad(), rng.draw(frozen.seeds, examples.index):
            left &= bench.arena.model.predict(frozen.model(result.images))[0] == examples.labels
    fresh = bench.climb.claim[:, : bench.images].float().mean(0)
    passed = not _above(left.float() - fresh)
    facts = {"frozen": float(left.float().mean()), "fresh": float(fresh.mean())}
    reason = (
        f"with the draw known {100 * facts['frozen']:.1f} % stay right, with fresh draws {100 * facts['fresh']:.1f} %; "
        f"{_blind(bench.images)}"
    )
    return Verdict(name="frozen draw", passed=passed, reason=reason, facts=facts)


def eot_curve(bench: _Bench) -> Verdict | None:
    """Ask whether more draws a step still lower the accuracy at the end of the curve."""
    claim = bench.rungs[0]
    if not is_noisy(bench.arena.model) or not hasattr(claim, "eot"):
        return None
    most = int(claim.eot)  # type: ignore[attr-defined]
    counts = sorted({1, max(1, most // 2), most, 2 * most})
    curve = {count: bench.accuracy(_with(claim, eot=count), bench.climb.epsilon) for count in counts}
    falls = _above(curve[most] - curve[2 * most])
    worst = bench.climb.correct[:, : bench.images].float().mean(0)
    below = _above(worst - curve[2 * most])
    facts = {f"eot_{count}": float(values.mean()) for count, values in curve.items()}
    text = ", ".join(f"{100 * value:.1f} % at {name.removeprefix('eot_')}" for name, value in facts.items())
    reason = f"accuracy by draws a step: {text}; {_blind(bench.images)}"
    if falls:
        reason += "; it still falls" + ("" if below else ", but not below the worst case of the ladder")
    return Verdict(name="EOT curve", passed=not (falls and below), reason=reason, facts=facts)


def effort(bench: _Bench) -> Verdict | None:
    """Ask whether more steps help as they should: one leaves no less than many, four times as many no more.

    And four times the steps of the claim's rung must not leave less than the whole ladder.
    """
    claim, epsilon = bench.rungs[0], bench.climb.epsilon
    if not hasattr(claim, "steps"):
        return None
    steps = int(claim.steps)  # type: ignore[attr-defined]
    one, many, more = (bench.accuracy(_with(claim, steps=count), epsilon) for count in (1, steps, 4 * steps))
    worst = bench.climb.correct[:, : bench.images].float().mean(0)
    facts = {"one_step": float(one.mean()), "steps": float(many.mean()), "four_times": float(more.mean())}
    wrong = []
    if _above(many - one):
        wrong.append("one step leaves less than many")
    if _above(more - many):
        wrong.append("more steps leave more")
    if _above(worst - more):
        wrong.append("more steps of the first rung leave less than the whole ladder: raise its budget")
    text = f"1, {steps} and {4 * steps} steps leave {100 * facts['one_step']:.1f}, {100 * facts['steps']:.1f} and "
    reason = "; ".join([f"{text}{100 * facts['four_times']:.1f} %", *wrong, _blind(bench.images)])
    return Verdict(name="effort", passed=not wrong, reason=reason, facts=facts)


def white_box_strength(bench: _Bench) -> Verdict | None:
    """Ask whether transfer or gradient-free rungs took away what white-box rungs should have taken."""
    steps, lost = bench.climb.steps, {"transfer": 0.0, "gradient-free": 0.0}
    for before, step in pairwise(steps):
        if step.kind in lost:
            lost[step.kind] += before.left.value - step.left.value
    total, count = sum(lost.values()), steps[0].left.images
    error = math.sqrt(max(total * (1 - total), 0.0) / count)
    passed = total <= max(_LEAST, _NORMAL * error)
    reason = (
        f"after the white-box rungs transfer took {100 * lost['transfer']:.1f} points and attacks without gradients "
        f"{100 * lost['gradient-free']:.1f}"
    )
    if not passed:
        reason += "; gradients of the model are masked, the worst case rests on other means"
    return Verdict(name="white-box strength", passed=passed, reason=reason, facts=dict(lost))


CHECKS: Final[dict[str, Callable[[_Bench], Verdict | None]]] = {
    "self-test": self_test,
    "gradients": gradients,
    "large radius": large_radius,
    "frozen draw": frozen_draw,
    "EOT curve": eot_curve,
    "effort": effort,
    "white-box strength": white_box_strength,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Frozen:
    """Run a model under the same draws, whatever is asked for."""

    model: Model
    seeds: tuple[int, ...]

    def __call__(self, images: Tensor, /) -> Tensor:
        ambient = rng.current()
        with rng.draw(self.seeds, ambient.examples if ambient else None):
            return self.model(images)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Readout:
    """Read the features of a model linearly, each image of the batch by weights of its own.

    There are two classes, and two more that nobody predicts: losses that are scaled by the third logit need them.

    Attributes:
        model: With features.
        weight: One row for each image.
        bias: Of each image.
    """

    model: Any
    weight: Float[Tensor, "batch features"]
    bias: Float[Tensor, "batch"]

    def scores(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw batch"]:
        """Return the scores of the second class; adversarial where they are positive."""
        return (features_of(self.model, images) * self.weight).sum(-1) + self.bias

    def __call__(self, images: Tensor, /) -> Float[Tensor, "draw 1 batch 4"]:
        """Return the logits of the classes."""
        score = self.scores(images) / 2
        nobody = -3 - score.abs().detach()
        return torch.stack([-score, score, nobody, nobody], -1)[:, None]


def features_of(model: Any, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "draw batch features"]:
    """Return what the last layers of all members are given, side by side."""
    if not isinstance(model, Ensemble):
        return model.features(images)
    found = [value.flatten(1).unflatten(0, (-1, len(images))) for value in model.outputs(images).features]
    return torch.cat(found, -1)


def _readout(bench: _Bench, problem: Problem) -> tuple[_Readout, Bool[Tensor, "images"]]:
    """Return a readout for each image, and whether its corner is adversarial on draws that the fit did not see."""
    inner, fitting, fresh = 32, bench.draws("fit", 8), bench.draws("corner", 48)
    model = bench.arena.model
    corner = _corner(problem, 1, 1.0)
    points = [problem.images, *(_corner(problem, index, 0.95) for index in range(2, 2 + inner)), corner]
    with torch.no_grad(), rng.draw(fitting, problem.examples):
        seen = torch.stack([features_of(model, point) for point in points])  # [point, draw, batch, features]
    mean, weight, bias = _ridge(seen)
    readout = _Readout(model=model, weight=weight, bias=bias - (mean * weight).sum(-1))
    with torch.no_grad(), rng.draw(fresh, problem.examples):
        there, here = readout.scores(corner).mean(0), readout.scores(problem.images).mean(0)
    return readout, (there > 0.1) & (here < -0.1)


def _ridge(
    seen: Float[Tensor, "point draw batch features"],
) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch features"], Float[Tensor, "batch"]]:
    """Return centre, weights and bias of the linear score that is 1 at the last point and -1 at all others."""
    points, draws, batch, _ = seen.shape
    samples = seen.permute(2, 0, 1, 3).flatten(1, 2).double()  # [batch, point x draw, features]
    mean = samples.mean(1, keepdim=True)
    centred = samples - mean
    target = torch.full((points,), -1.0, dtype=torch.float64, device=seen.device)
    target[-1] = 1.0
    heavy = torch.ones_like(target)
    heavy[-1] = points - 1  # both classes weigh alike
    target, heavy = target.repeat_interleave(draws), heavy.repeat_interleave(draws).sqrt()
    a = torch.cat([centred, torch.ones_like(centred[..., :1])], -1) * heavy[:, None]
    gram = a @ a.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram += 1e-4 * scale[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    dual = torch.linalg.solve(gram, (heavy * target).expand(batch, -1))
    solution = (a * dual[..., None]).sum(1)
    return mean[:, 0].to(seen.dtype), solution[:, :-1].to(seen.dtype), solution[:, -1].to(seen.dtype)


def _corner(problem: Problem, index: int, share: float) -> Float[Tensor, "batch *image"]:
    """Return a point of the rim of the ball of a share of its radius: towards another image, or at random.

    Odd numbers point to the image so many places further, even ones in a random direction.
    """
    u = rng.uniform(rng.derive(problem.seed, index), problem.examples, problem.images[0].numel(), address="corner")
    direction = (u - 0.5).view_as(problem.images).to(problem.images.dtype)
    if index % 2:
        towards = problem.images.roll(-(index + 1) // 2, 0) - problem.images
        direction = torch.where(towards == 0, 0.01 * direction, towards)
    return replace(problem, epsilon=share * problem.epsilon).ascend(problem.images, direction, share * problem.epsilon)


def _rise(
    problem: Problem, direction: Tensor, length: float, margin: Callable[[Tensor], Tensor], seeds: list[int]
) -> Float[Tensor, "batch"]:
    before = problem.loss(problem.images, margin, seeds=seeds)
    after = ascend(problem.images, direction, length, problem.norm).clamp(0, 1)
    return problem.loss(after, margin, seeds=seeds) - before


def _iterates(attack: Attack) -> bool:
    return getattr(attack, "steps", 1) > 1 and getattr(attack, "source", None) is None


def _distinct(rungs: list[Attack]) -> list[Attack]:
    """Return the rungs that differ on a single-member model with one wrong class to go to."""
    chosen: dict[str, Attack] = {}
    for rung in rungs:
        changes = {"targets": 1} if "targets" in {item.name for item in fields(rung)} else {}
        changed = replace(rung, **changes)
        chosen.setdefault(changed.label, changed)
    return list(chosen.values())


def _with(attack: Attack, **changes: Any) -> Attack:
    """Return the attack with those changes that it has a field for."""
    names = {item.name for item in fields(attack)}
    return replace(attack, **{name: value for name, value in changes.items() if name in names})


def _score(differences: Float[Tensor, "images"]) -> float:
    """Return the mean of paired differences in standard errors."""
    values = differences.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.inf
    return float(values.mean()) / max(error, 1e-12)


def _above(differences: Float[Tensor, "images"]) -> bool:
    """Return whether paired differences in accuracy are positive beyond chance and beyond what matters."""
    return float(differences.mean()) > _LEAST and _score(differences) > _NORMAL


def _blind(images: int) -> str:
    """Say from which difference on, of images that are right on every draw or on none, `_above` sees it."""
    changed = (torch.arange(images) < number for number in range(1, images + 1))
    least = next((float(row.float().mean()) for row in changed if _above(row.float())), None)
    if least is None:
        return f"on {images} images no difference is seen"
    return f"on {images} images a difference is seen from {100 * least:.0f} points on"


def _tail(count: int, least: int, probability: float) -> float:
    """Return the probability of at least so many of `count` independent events.

    Examples:
        >>> round(_tail(16, 4, 0.05), 4)
        0.007
    """
    terms = (math.comb(count, k) * probability**k * (1 - probability) ** (count - k) for k in range(least))
    return 1.0 - sum(terms)
