"""Climb the ladder: a cascade of attacks, cheap ones first, of which each meets what the ones before left standing.

Three sets of draws stay apart. An attack averages over its own. Which of an image's adversarial versions is the worst,
and whether the image still stands, is decided on *selection* draws by a sequential test. Every accuracy is then stated
on *judging* draws, which neither the attacks nor the selection saw.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, final, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.attacks import APGD, FAB, FGSM, APGDTargeted, Attack, Kind, RandomNoise, Square
from bitquorum.attacks.blackbox import EstimatedGradient
from bitquorum.data import ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate.accuracy import Accuracy, interval, worst_of
from bitquorum.evaluate.sequential import SequentialTest, Tally
from bitquorum.geometry import Norm, increasing, norm_of
from bitquorum.interface import Cost, InputError, Listener, Method, Model
from bitquorum.kernels import bfloat16_pays, wide
from bitquorum.layers import Noise
from bitquorum.quantizers import Quantizer, Surrogate
from bitquorum.quantizers.twin import Twin

_PACE = 20.0  # seconds between two words on the passes of a batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Hold the images under attack: float images in [0, 1], labels, and the identity of each example."""

    images: Float[Tensor, "images *image"]
    labels: Int[Tensor, "images"]
    index: Int[Tensor, "images"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Say what one rung did.

    Attributes:
        rung: Label of the attack, or `clean`.
        kind: What the attacker uses: `white-box`, `transfer`, `gradient-free`, or `none` for clean images.
        attacked: Number of images that the rung met.
        broke: Number of these that stood before and were broken.
        alone: Accuracy on what the rung made of the images, where it met all of them.
        left: Accuracy of the worst case over the rungs so far, on all images.
        cost: Passes of each image that it met.
        largest: Largest perturbation, in the norm of the ladder.
    """

    rung: str
    kind: Kind
    attacked: int
    broke: int
    alone: Accuracy | None
    left: Accuracy
    cost: Cost
    largest: float


@dataclass(kw_only=True, eq=False)
class Climb:
    """Hold how far the ladder has come at one epsilon; complete once every rung has been climbed.

    Attributes:
        epsilon: Radius.
        steps: What each rung did, clean images first.
        images: The worst version of each image so far.
        rate: Its estimated probability of being right, on selection draws.
        second: Its rate of being right on the further selection draws of the second look alone; -1 before one.
        standing: Whether the image still stands.
        broken_by: Number of the step that made the worst version.
        correct: Whether each judging draw of the worst version is right.
        claim: The same for the versions of the claim's rung alone.
    """

    epsilon: float
    steps: list[Step]
    images: Float[Tensor, "images *image"]
    rate: Float[Tensor, "images"]
    second: Float[Tensor, "images"]
    standing: Bool[Tensor, "images"]
    broken_by: Int[Tensor, "images"]
    correct: Bool[Tensor, "draws images"]
    claim: Bool[Tensor, "draws images"]

    @property
    def clean(self) -> Accuracy:
        """Accuracy on clean images."""
        return self.steps[0].left

    @property
    def claimed(self) -> Accuracy:
        """Accuracy under the claim's rung alone: the attacker backpropagates through the quantizers."""
        return interval(self.claim)

    @property
    def worst(self) -> Accuracy:
        """Accuracy of the worst case over all rungs."""
        return interval(self.correct)

    def worst_of(self, tries: int) -> float:
        """Return the accuracy of the worst case against an attacker who tries each image `tries` times."""
        return worst_of(self.correct, tries)


@final
@dataclass(frozen=True, kw_only=True)
class Ladder(Method):
    """Attack a model by one rung after the other and state what the worst of them leaves.

    The claim's rung meets every image, so that its accuracy stands on its own. Every later rung meets the images that
    still stand, or all of them where `everywhere` is set. Rungs that cannot differ on the model at hand are left out:
    see `rungs_for`.

    Attributes:
        name: For tables.
        claim: The attack of the claim as worded: projected gradient descent through the stochastic quantizer.
        rungs: The other attacks, in order.
        epsilons: Radii, in units of the image.
        norm: `linf` or `l2`; rungs that do not have it are left out.
        examples: Number of test images, balanced over classes; 0 for all.
        draws: Judging draws.
        survivors: Decides on selection draws which images still stand.
        batch_size: Images attacked at once; it changes results by rounding alone.
        everywhere: Whether every rung meets every image.
        tries: Number of tries of the attacker in the worst-of accuracy.
        check_images: Number of images for the self-checks; 0 leaves them out.
        precision: `bfloat16` autocasts the attacks, which may then move otherwise, and the choice among the versions of
            an image under noise; `None` leaves them as they are, and `auto` is `bfloat16` on devices where it pays (see
            `kernels.bfloat16_pays`), `None` on others. Judgment is never autocast, nor what gives an image up as
            broken, and every perturbation is kept in float32.
        seed: Of the choice of images, of attacks and of draws.
        skip: Leave out the images of a ladder of so many examples and the same seed, and take the next ones: where a
            recipe was chosen by what it left of those, they no longer speak for it. `None` leaves out none.
    """

    name: str
    claim: Attack
    rungs: tuple[Attack, ...]
    epsilons: tuple[float, ...] = (5 / 255,)
    norm: Norm = "linf"
    examples: int = 500
    draws: int = 50
    survivors: SequentialTest = field(default_factory=SequentialTest)
    batch_size: int = 100
    everywhere: bool = False
    tries: int = 5
    check_images: int = 32
    precision: Literal["auto", "bfloat16"] | None = None
    seed: int = 0
    skip: int | None = None

    def __post_init__(self) -> None:
        if not self.epsilons or not increasing(self.epsilons) or min(self.epsilons) <= 0:
            raise InputError(f"expected increasing positive epsilons, a millionth apart, got {self.epsilons}")
        if self.norm == "linf" and max(self.epsilons) > 1:
            raise InputError(
                f"expected epsilons of at most 1 in the maximum norm, in units of the image, got {self.epsilons}; "
                "write 8/255 for 8 of 255 steps"
            )
        if min(self.draws, self.batch_size) < 1 or min(self.examples, self.check_images) < 0:
            raise InputError(
                "expected at least one draw and one image per batch, and numbers of images of at least 0, got "
                f"{self.draws}, {self.batch_size}, {self.examples} and {self.check_images}"
            )
        if self.skip is not None and self.skip < 1:
            raise InputError(f"expected a number of images to skip of at least 1, or none, got {self.skip}")
        if not 1 <= self.tries <= self.draws:
            raise InputError(f"expected tries from 1 to the {self.draws} draws, got {self.tries}")
        labels = [attack.label for attack in (self.claim, *self.rungs)]
        if len(set(labels)) != len(labels):
            raise InputError(f"expected rungs with different labels, got {labels}")
        if self.norm not in self.claim.norms:
            raise InputError(f"expected a claim that has the norm {self.norm}, got {self.claim.label}")

    def choose(self, data: ImageSet) -> ImageSet:
        """Return the images to evaluate on: without `skip` those of an `Evaluation` of equal number and seed.

        Raises:
            InputError: if fewer images are there than are to be skipped and taken.
        """
        seed, skip = rng.derive(self.seed, "examples"), self.skip or 0
        count = skip + self.examples if self.examples else len(data)
        if skip and (skip >= len(data) or count > len(data)):
            raise InputError(
                f"{data.name} ({data.split}): expected at most {len(data)} images to skip and to take, got {skip} and "
                f"{self.examples or 'all others'}"
            )
        chosen = data if count >= len(data) else data.take(count, seed=seed)
        if not skip:
            return chosen
        return chosen.select((~torch.isin(chosen.index, data.take(skip, seed=seed).index)).nonzero()[:, 0])

    def on(self, device: torch.device | str) -> "Ladder":
        """Return the ladder as a device climbs it: with an `auto` precision settled."""
        if self.precision != "auto":
            return self
        return replace(self, precision="bfloat16" if bfloat16_pays(torch.device(device)) else None)

    def rungs_for(self, model: Model, sources: Mapping[str, Model] | None = None) -> tuple[Attack, ...]:
        """Return the claim's rung and all others that can differ on this model, with a transfer rung for each source.

        A model without noise needs one draw a step: attacks by queries take their draws as queries, FAB as steps, APGD
        as steps up to the hundred of its paper. A model without our quantizers needs no choice of their backward pass
        and at most one copy without noise, one with a single member and no noise no choice of pooling. What is equal
        then is climbed once. A rung whose source is `*` stands for one rung for each of `sources`, and what a transfer
        rung does to a source is fitted to that.
        """
        chosen: dict[str, Attack] = {}
        held = sources or {}
        for attack in (self.claim, *self.rungs):
            if self.norm not in attack.norms:
                continue
            for rung in _with_sources(attack, held):
                source = getattr(rung, "source", None)
                if source in get_args(Twin) and source not in twins_of(model):
                    continue
                fitted = _fit(rung, model, held)
                chosen.setdefault(fitted.label, fitted)
        return tuple(chosen.values())

    def passes(self, model: Model, sources: Mapping[str, Model] | None = None) -> Cost:
        """Return the passes of an image that stands to the end, by a dry run of every rung on a model of ten pixels."""
        total = Cost()
        for attack in self.rungs_for(model, sources):
            total = total + _price(attack, self.norm, _members(model))
        return total

    @torch.no_grad()
    def __call__(
        self,
        model: Model,
        examples: Examples,
        *,
        epsilon: float,
        sources: Mapping[str, Model] | None = None,
        shown: Model | None = None,
        climb: Climb | None = None,
        on_step: Callable[[Climb], None] | None = None,
        listener: Listener | None = None,
    ) -> Climb:
        """Climb at one epsilon.

        Args:
            model: With `predict` and `passes`, such as an `Ensemble` in evaluation mode or a wrapped module.
            examples: Images, labels and identities, on the model's device.
            epsilon: Radius.
            sources: Other models that the attacker holds, by the names that rungs give them.
            shown: What the attacks see in place of the model: the same outputs with other gradients (BPDA).
            climb: Of an earlier, interrupted call; its rungs are not climbed again.
            on_step: Called after every rung with the climb so far.
            listener: Hears how many batches of a rung are done and, in long ones, of the passes within.

        Raises:
            InputError: if the rungs of the earlier climb are not those that this one begins with, or a source has the
                name of a copy without noise.
        """
        check_sources(sources or ())
        arena = Arena(model=model, shown=shown or model, examples=examples, ladder=self, sources=sources or {})
        climb = climb or arena.start(epsilon)
        rungs = self.rungs_for(model, arena.sources)
        done = [step.rung for step in climb.steps[1:]]
        if done != [rung.label for rung in rungs[: len(done)]]:
            raise InputError(
                f"expected an interrupted climb of {[rung.label for rung in rungs]}, got one of {done}; "
                "remove what is stored of it to begin anew"
            )
        for number, attack in enumerate(rungs, start=1):
            if number < len(climb.steps):
                continue
            everyone = torch.arange(len(examples.labels), device=examples.labels.device)
            met = everyone if number == 1 or self.everywhere else everyone[climb.standing]
            arena.climb(climb, attack, met, listener)
            if on_step:
                on_step(climb)
        return climb


@dataclass(frozen=True, kw_only=True, eq=False)
class Arena:
    """Bring model, images and ladder together: attack, score on selection draws, judge on judging draws.

    Attributes:
        model: Is judged; has `predict` and `passes`.
        shown: Is attacked: the model itself, or one of the same outputs with other gradients.
        examples: Images, labels and identities.
        ladder: Draws, seeds and batch size.
        sources: Other models that the attacker holds.
    """

    model: Any
    shown: Model
    examples: Examples
    ladder: Ladder
    sources: Mapping[str, Model]

    @torch.no_grad()
    def warm(self) -> None:
        """Pass two images once as attack, selection and judgment do, so that no rung's time is that of a compiler."""
        rows = torch.arange(min(2, len(self.examples.images)), device=self.examples.images.device)
        images, labels = self.examples.images[rows], self.examples.labels[rows]
        for low in (True, False):
            with self._autocast(low=low):
                FGSM()(self.shown, images, labels, epsilon=1 / 255)
            self.right(images, rows, "warm", 0, 1, low=low)

    def start(self, epsilon: float) -> Climb:
        """Judge the clean images."""
        images = self.examples.images
        everyone = torch.arange(len(images), device=images.device)
        tally, correct = self.score(images, everyone), self.judge(images, everyone)
        accuracy = interval(correct)
        step = Step(
            rung="clean",
            kind="none",
            attacked=0,
            broke=int(tally.broken.sum()),
            alone=accuracy,
            left=accuracy,
            cost=Cost(),
            largest=0.0,
        )
        return Climb(
            epsilon=epsilon,
            steps=[step],
            images=images.clone(),
            rate=tally.rate,
            second=torch.full_like(tally.rate, -1),
            standing=~tally.broken,
            broken_by=torch.zeros_like(self.examples.labels),
            correct=correct,
            claim=correct,
        )

    def climb(
        self,
        climb: Climb,
        attack: Attack,
        met: Int[Tensor, "met"],
        listener: Listener | None = None,
    ) -> None:
        """Let one attack meet the chosen images and keep what is worse than before."""
        found, cost = self.attack(attack, met, climb.epsilon, listener)
        tally = self.score(found, met)
        worse, rate, second = self._confirm(climb, found, met, tally)
        everyone = len(met) == len(climb.images)
        judged = torch.ones_like(worse) if everyone else worse
        correct = climb.correct[:, met]
        correct[:, judged] = self.judge(found[judged], met[judged])
        changed, number = met[worse], len(climb.steps)
        broke = int((tally.broken & climb.standing[met]).sum())
        climb.images[changed], climb.rate[changed], climb.second[changed] = found[worse], rate[worse], second[worse]
        climb.broken_by[changed] = number
        climb.standing[met] &= ~tally.broken
        climb.correct = climb.correct.clone()
        climb.correct[:, changed] = correct[:, worse]
        if number == 1:
            climb.claim = correct
        moved = norm_of(found - self.examples.images[met], self.ladder.norm)
        step = Step(
            rung=attack.label,
            kind=attack.kind,
            attacked=len(met),
            broke=broke,
            alone=interval(correct) if everyone else None,
            left=interval(climb.correct),
            cost=cost,
            largest=float(moved.max()) if len(met) else 0.0,
        )
        climb.steps.append(step)

    def attack(
        self,
        attack: Attack,
        met: Int[Tensor, "met"],
        epsilon: float,
        listener: Listener | None = None,
    ) -> tuple[Float[Tensor, "met *image"], Cost]:
        """Return the adversarial versions of the chosen images, and the passes of each."""
        seed = rng.derive(self.ladder.seed, "attack", attack.label, repr(epsilon))
        found, cost = self.examples.images[met], Cost()
        parts = met.split(self.ladder.batch_size) if len(met) else ()
        news = _News(listener or Listener(), attack.label, len(parts))
        for number, rows in enumerate(parts, start=1):
            with self._autocast(low=True), news.heard(self.shown, len(rows)):
                result = attack(
                    self.shown,
                    self.examples.images[rows],
                    self.examples.labels[rows],
                    epsilon=epsilon,
                    examples=self.examples.index[rows],
                    seed=seed,
                    norm=self.ladder.norm,
                    sources=self.sources,
                    at_once=self.ladder.batch_size,
                )
            first = (number - 1) * self.ladder.batch_size
            found[first : first + len(rows)], cost = result.images, result.cost
            news.advance()
        return found, cost

    @property
    def _low(self) -> bool:
        return self.ladder.on(self.examples.images.device).precision == "bfloat16"

    def _autocast(self, *, low: bool) -> AbstractContextManager[object]:
        kind = self.examples.images.device.type
        return torch.autocast(kind, torch.bfloat16) if low and self._low else nullcontext()

    def score(self, found: Float[Tensor, "met *image"], met: Int[Tensor, "met"]) -> Tally:
        """Test on selection draws which of the versions stand.

        Under noise this is done in the precision of the attacks, and again in float32 for a version that falls there:
        no image is given up for a rounding. Without noise a rounding could hide a version just beyond the boundary from
        the only draw there is, which is in float32 therefore.
        """
        low = self._low and is_noisy(self.model)
        tally = self._score(found, met, low=low)
        fallen = tally.broken.nonzero()[:, 0] if low else ()
        if len(fallen):
            again = self._score(found[fallen], met[fallen], low=False)
            tally.right[fallen], tally.draws[fallen], tally.broken[fallen] = again.right, again.draws, again.broken
        return tally

    def _score(self, found: Float[Tensor, "met *image"], met: Int[Tensor, "met"], *, low: bool) -> Tally:
        noisy = is_noisy(self.model)
        test = self.ladder.survivors if noisy else None
        parts = []
        for first in range(0, len(met), self.ladder.batch_size):
            rows = slice(first, first + self.ladder.batch_size)

            def predict(chosen: Tensor, start: int, count: int, rows: slice = rows) -> Tensor:
                return self.right(found[rows][chosen], met[rows][chosen], "selection", start, count, low=low)

            size = len(met[rows])
            if test is not None:
                block = min(test.least, self._draws_at_once(size))
                parts.append(test(predict, size, block=block, device=found.device))
                continue
            right = predict(torch.arange(size, device=found.device), 0, 1)[0]
            parts.append(Tally(right=right.long(), draws=torch.ones_like(right).long(), broken=~right))
        if not parts:
            empty = torch.zeros(0, dtype=torch.int64, device=found.device)
            return Tally(right=empty, draws=empty, broken=empty.bool())
        return Tally(
            right=torch.cat([part.right for part in parts]),
            draws=torch.cat([part.draws for part in parts]),
            broken=torch.cat([part.broken for part in parts]),
        )

    def _confirm(
        self, climb: Climb, found: Float[Tensor, "met *image"], met: Int[Tensor, "met"], tally: Tally
    ) -> tuple[Bool[Tensor, "met"], Float[Tensor, "met"], Float[Tensor, "met"]]:
        """Return which versions are worse, the rate of each over all draws it was seen on, and that of the second look.

        Worse is a lower rate, and no higher one on further draws. The first few draws of a version decide little more
        than luck; without the second look a weaker attack that is lucky on them would push out a stronger one's
        version, and without its draws in the rate the luck would keep the next one out. The first attack replaces the
        clean image at an equal rate too, if further draws are worse for it. A version is looked at a second time once.
        """
        rate, before, second = tally.rate, climb.rate[met], torch.full_like(tally.rate, -1)
        worse = rate < before
        if not is_noisy(self.model):
            return worse, rate, second
        rate, count = rate.clone(), self.ladder.survivors.most
        tied = (rate == before) & (len(climb.steps) == 1)
        for rows in ((worse | tied) & ~tally.broken).nonzero()[:, 0].split(self.ladder.batch_size):
            unseen = met[rows][climb.second[met[rows]] < 0]
            climb.second[unseen] = self._rate(climb.images[unseen], unseen)
            new, old = self._rate(found[rows], met[rows]), climb.second[met[rows]]
            worse[rows] = (new < old) | ((new == old) & worse[rows])
            seen = tally.draws[rows] + count
            rate[rows] = (tally.right[rows] + count * new + 1) / (seen + 2)
            second[rows] = new
        return worse, rate, second

    def _rate(self, version: Tensor, rows: Int[Tensor, "chosen"]) -> Float[Tensor, "chosen"]:
        """Return the rate of being right on the draws of the second look, which follow those of the test."""
        if not len(rows):
            return torch.zeros(0, device=version.device)
        first = count = self.ladder.survivors.most
        block = self._draws_at_once(len(rows))
        parts = [
            self.right(version, rows, "selection", start, min(block, first + count - start), low=True)
            for start in range(first, first + count, block)
        ]
        return torch.cat(parts).float().mean(0)

    def judge(self, found: Float[Tensor, "met *image"], met: Int[Tensor, "met"]) -> Bool[Tensor, "draws met"]:
        """Return whether each judging draw of each version is right; a model without noise is asked once."""
        draws, count = self.ladder.draws, self.ladder.draws if is_noisy(self.model) else 1
        correct = torch.zeros(draws, len(met), dtype=torch.bool, device=found.device)
        for first in range(0, len(met), self.ladder.batch_size):
            rows = slice(first, first + self.ladder.batch_size)
            block = self._draws_at_once(len(met[rows]))
            for start in range(0, count, block):
                number = min(block, count - start)
                correct[start : start + number, rows] = self.right(found[rows], met[rows], "judge", start, number)
        return correct if count == draws else correct[:1].expand(draws, -1).clone()

    def _draws_at_once(self, images: int) -> int:
        """Return how many draws make, of so many images, the rows of a full batch under an attack of ten draws."""
        return max(1, 10 * self.ladder.batch_size // images)

    def right(
        self,
        found: Float[Tensor, "chosen *image"],
        rows: Int[Tensor, "chosen"],
        purpose: str,
        first: int,
        count: int,
        *,
        low: bool = False,
    ) -> Bool[Tensor, "draws chosen"]:
        """Return whether each of some predictions of some versions is right; `low`: in the precision of the attacks."""
        passes, seed = self.model.passes, rng.derive(self.ladder.seed, purpose)
        seeds = [rng.derive(seed, "draw", first + draw, part) for draw in range(count) for part in range(passes)]
        with rng.draw(seeds, self.examples.index[rows]), self._autocast(low=low):
            return self.model.predict(wide(self.model(found))) == self.examples.labels[rows]


def is_noisy(model: Model) -> bool:
    """Return whether two draws of a model can differ; one that does not say is taken to be random."""
    return bool(getattr(model, "stochastic", True))


@lru_cache(maxsize=64)
def _price(attack: Attack, norm: Norm, members: int) -> Cost:
    """Return the passes of an attack, which depend neither on the image nor on the network."""
    image, label = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.int64)

    def model(images: Tensor) -> Tensor:
        ambient = rng.current()
        draws = len(ambient.seeds) if ambient else 1
        logits = images.flatten(1)[:, :10] * torch.linspace(0.5, 1.5, 10)
        return logits.expand(draws, members, -1, -1)

    class Anything(dict[str, Model]):
        def __missing__(self, key: str) -> Model:
            return model

    return attack(model, image, label, epsilon=0.1, norm=norm, sources=Anything(), at_once=100).cost


def is_quantized(model: Model) -> bool:
    """Return whether a model has quantizers of ours that round: not those that only hold the range of a noise."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    held = {id(inner) for module in modules if isinstance(module, Noise) for inner in module.modules()}
    return any(isinstance(module, Quantizer) and id(module) not in held for module in modules)


def twins_of(model: Model) -> tuple[Twin, ...]:
    """Return the copies without noise that differ: all of a model that rounds, one of a model with other noise."""
    if is_quantized(model):
        return get_args(Twin)
    noisy = isinstance(model, torch.nn.Module) and any(isinstance(module, Noise) for module in model.modules())
    return ("mean",) if noisy else ()


def _with_sources(attack: Attack, sources: Collection[str]) -> list[Attack]:
    """Return the attack, or one for each source where its own is `*`."""
    if getattr(attack, "source", None) != "*":
        return [attack]
    return [replace(attack, **{"source": name}) for name in sources]


def check_sources(names: Iterable[str]) -> None:
    """Refuse names of models that the attacker holds which rungs would take for a copy of the model under attack.

    Raises:
        InputError: if there is one.
    """
    taken = [name for name in names if name in get_args(Twin)]
    if taken:
        raise InputError(
            f"expected sources of other names than {', '.join(get_args(Twin))}, which are copies of the model under "
            f"attack, got {taken[0]!r}; rename it"
        )


def _fit(attack: Attack, model: Model, sources: Mapping[str, Model]) -> Attack:
    """Return an attack without the choices that cannot differ on a model."""
    names = {item.name for item in fields(attack)}
    changes: dict[str, Any] = {}
    if not is_noisy(model):
        changes |= _as_queries(attack)
        changes |= {name: 1 for name in ("eot", "selection", "draws") if name in names}
        changes |= {name: False for name in ("common", "fresh") if name in names}
    if not is_quantized(model) and "surrogate" in names:
        changes["surrogate"] = Surrogate()
    if _members(model) == 1 and not is_noisy(model) and "pooling" in names:
        changes["pooling"] = "mean-loss"
    if "attack" in names:
        inner: Attack = attack.attack  # type: ignore[attr-defined]
        changes["attack"] = _fit(inner, sources.get(getattr(attack, "source", ""), model), sources)
    return replace(attack, **changes)


def _as_queries(attack: Attack) -> dict[str, Any]:
    """Return the budget of an attack whose draws are better spent on queries or steps."""
    match attack:
        case Square():
            return {"queries": attack.queries * attack.eot * (2 if attack.fresh else 1)}
        case FAB():
            return {"steps": attack.steps * attack.eot}
        case APGD() | APGDTargeted():
            return {"steps": max(attack.steps, min(100, attack.steps * attack.eot))}
        case EstimatedGradient():
            return {"directions": attack.directions * attack.eot}
        case RandomNoise():
            return {"tries": attack.tries * attack.draws}
    return {}


class _News:
    """Tell a listener of the batches of a rung and, every few seconds, of the passes of the present one."""

    def __init__(self, listener: Listener, rung: str, batches: int) -> None:
        self.listener, self.rung, self.batches, self.done = listener, rung, batches, 0
        self.asked, self.told = 0, time.monotonic()

    @contextmanager
    def heard(self, model: Model, images: int) -> Iterator[None]:
        """Count what is asked of a model, as images under a draw; of one that is no module nothing is known."""

        def count(*call: Any) -> None:
            draws, _, batch, _ = call[2].shape
            self.asked += draws * batch
            if time.monotonic() - self.told >= _PACE:
                self._tell(f", {self.asked // images:,} forward passes an image into the next")

        handle = model.register_forward_hook(count) if isinstance(model, torch.nn.Module) else None
        try:
            yield
        finally:
            if handle:
                handle.remove()

    def advance(self) -> None:
        """Hear that a batch is done."""
        self.done, self.asked = self.done + 1, 0
        self._tell("")

    def _tell(self, more: str) -> None:
        self.told = time.monotonic()
        self.listener.advance(self.done, f"of {self.batches} batches, {self.rung}{more}")


def _members(model: Model) -> int:
    return model.answers if isinstance(model, Ensemble) else 1
