"""Certify an ensemble: count the images whose prediction no image of the ball can change."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from bitquorum import rng
from bitquorum.bounds import Bound, Scope, Validity, margins
from bitquorum.certify.aggregate import holds
from bitquorum.data import Batch, ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Accuracy, interval, judge
from bitquorum.geometry import increasing
from bitquorum.interface import InputError, Method

Statement: TypeAlias = Validity | Literal["clean"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    """Hold which images are certified, or right when clean.

    Attributes:
        statement: What it is valid for, see `Certify`; `clean` for predictions of the images themselves.
        epsilon: Radius in the maximum norm.
        certified: A row for each draw; a single one where the statement is of no draw.
    """

    statement: Statement
    epsilon: float
    certified: Bool[Tensor, "draws images"]

    def accuracy(self) -> Accuracy:
        """Return the share of images with its interval."""
        return interval(self.certified)


@final
@dataclass(frozen=True, kw_only=True)
class Certify(Method):
    """Bound the accuracy of an ensemble from below, whatever the attack in the maximum norm.

    Three statements, of falling strength:

    - `all`: under every draw that the generator can make, at every image of the ball, the prediction is right.
    - `fresh`: under each of some fresh draws, at every image of the ball. Its mean over draws and images estimates,
      with an interval, a floor of the expected accuracy, which is what the ladder measures from above; even an attacker
      who knows the draw stays above it. It is no statement about a draw that was not looked at.
    - `nearest`: of the network that rounds to nearest in place of drawing. It is another defence.

    Images that a smaller epsilon, or no attack at all, leaves uncertified are not tried at a larger one. Bounds are
    computed in double precision and cover what single precision rounds; not half precision, and not TF32, which torch
    takes for convolutions on CUDA unless `torch.backends.cudnn.allow_tf32` is false where the network is served.

    Attributes:
        epsilons: Radii in the maximum norm, in units of the image; positive and increasing.
        statements: Those that are wanted. Without noise all are one, and only the first is computed, for one draw.
        bound: `ibp`, or `crown-ibp`, which is never looser and costs as much as several passes for each class.
        examples: Number of test images, balanced over classes; 0 for all.
        draws: Fresh draws.
        batch_size: Images bounded at once; it changes results by rounding alone.
        seed: Of the choice of images and of the draws.
    """

    epsilons: tuple[float, ...] = (1 / 255, 2 / 255, 5 / 255, 8 / 255)
    statements: tuple[Validity, ...] = ("all", "fresh")
    bound: Bound = "crown-ibp"
    examples: int = 500
    draws: int = 5
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epsilons or not increasing(self.epsilons):
            raise InputError(f"expected increasing epsilons, at least one, a millionth apart, got {self.epsilons}")
        if not all(0 < epsilon <= 1 for epsilon in self.epsilons):
            raise InputError(f"expected epsilons in (0, 1], got {self.epsilons}")
        known, wanted = get_args(Validity), self.statements
        if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(known):
            raise InputError(f"expected different statements among {', '.join(known)}, got {wanted}")
        if self.bound not in get_args(Bound):
            raise InputError(f"expected a bound among {', '.join(get_args(Bound))}, got {self.bound!r}")
        if min(self.draws, self.batch_size) < 1 or self.examples < 0:
            raise InputError(
                "expected at least one draw and one image per batch and examples of at least 0, got "
                f"{self.draws}, {self.batch_size} and {self.examples}"
            )

    def choose(self, data: ImageSet) -> ImageSet:
        """Return the images to certify: those of an evaluation or a ladder of equal number and seed."""
        if not self.examples or self.examples >= len(data):
            return data
        return data.take(self.examples, seed=rng.derive(self.seed, "examples"))

    def keys(self, ensemble: Ensemble) -> list[tuple[Statement, float]]:
        """Return the statement and epsilon of every certificate in order, clean images first."""
        wanted = self.statements if ensemble.stochastic else self.statements[:1]
        found: list[tuple[Statement, float]] = [("clean", 0.0)]
        return found + [(statement, epsilon) for statement in wanted for epsilon in self.epsilons]

    def __call__(
        self,
        ensemble: Ensemble,
        data: ImageSet,
        *,
        done: Sequence[Certificate] = (),
        on_certificate: Callable[[Certificate], None] | None = None,
        on_batch: Callable[[int, int], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> list[Certificate]:
        """Return all certificates, computing those that are not in `done`.

        Args:
            ensemble: Put into evaluation mode; its parameters are left without gradients.
            data: Images and labels, as `choose` returns them.
            done: Certificates of an earlier, interrupted call.
            on_certificate: Called with each new certificate.
            on_batch: Called with batches done and batches in all.
            device: Where to compute.

        Raises:
            InputError: if a module or the aggregation has no bounds.
        """
        ensemble = ensemble.to(device).eval().requires_grad_(False)
        known = {(part.statement, part.epsilon): part for part in done}
        keys = self.keys(ensemble)
        missing: list[Statement] = list(dict.fromkeys(key[0] for key in keys if key not in known))
        batches = list(data.batches(self.batch_size, device=device))
        count = 0
        for statement in missing:
            parts = []
            for batch in batches:
                parts.append(self._batch(ensemble, batch, statement))
                count += 1
                if on_batch:
                    on_batch(count, len(missing) * len(batches))
            radii = [epsilon for name, epsilon in keys if name == statement]
            for epsilon, flags in zip(radii, zip(*parts, strict=True), strict=True):
                certified = torch.cat(flags, 1).cpu()
                part = Certificate(statement=statement, epsilon=epsilon, certified=certified)
                known[statement, epsilon] = part
                if on_certificate:
                    on_certificate(part)
        return [known[key] for key in keys]

    def _batch(self, ensemble: Ensemble, batch: Batch, statement: Statement) -> list[Bool[Tensor, "draws images"]]:
        """Return which images of a batch are certified at each epsilon; right, for clean images."""
        draws = self.draws if ensemble.stochastic else 1
        seed = rng.derive(self.seed, "certify")
        right = judge(ensemble, batch.images, batch, draws=draws, seed=seed)
        if statement == "clean":
            return [right]
        if statement == "all":
            right = right.all(0, keepdim=True)
        elif statement == "nearest":
            right = torch.ones_like(right[:1])
        rows = [list(self._draw(ensemble, batch, statement, index, start)) for index, start in enumerate(right)]
        return [torch.stack(flags) for flags in zip(*rows, strict=True)]

    @torch.no_grad()
    def _draw(
        self, ensemble: Ensemble, batch: Batch, statement: Validity, index: int, standing: Tensor
    ) -> Iterator[Bool[Tensor, "images"]]:
        """Yield which images are certified at each epsilon, under one draw where the statement is of one."""
        seeds = rng.derive_many(rng.derive(self.seed, "certify"), ensemble.passes, "draw", index)
        scope = Scope(validity=statement)
        for epsilon in self.epsilons:
            chosen = standing.nonzero()[:, 0]
            standing = standing.clone()
            if len(chosen):
                images, labels = batch.images[chosen].double(), batch.labels[chosen]
                views = []
                for seed in seeds if statement == "fresh" else seeds[:1]:
                    with rng.draw(seed, batch.examples[chosen]):
                        views += [
                            margins(member, look, labels, epsilon=epsilon, bound=self.bound, scope=scope)
                            for look in ensemble.looks(images)
                            for member in ensemble.members
                        ]
                bounds = torch.stack(views).unflatten(0, (-1, ensemble.answers))
                standing[chosen] = holds(ensemble.aggregation, bounds, labels)
            yield standing
