"""Attack from other models: copies of the network without its noise, or whatever else the attacker holds."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Final, final, get_args

from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.attacks.base import Attack, Kind, Problem
from bitquorum.attacks.gradient import PGD
from bitquorum.geometry import Norm
from bitquorum.interface import InputError, Model
from bitquorum.quantizers import Surrogate
from bitquorum.quantizers.twin import Twin, twin

TWINS: Final[tuple[Twin, ...]] = get_args(Twin)


@dataclass(frozen=True, kw_only=True, eq=False)
class TwinModel:
    """Run a model with its quantizers free of noise.

    Attributes:
        model: The noisy model.
        kind: What every quantizer returns in place of a draw; see `quantizers.twin`.
    """

    model: Model
    kind: Twin

    def __call__(self, images: Float[Tensor, "batch *image"], /) -> Float[Tensor, "draw member batch classes"]:
        """Return the logits of the noise-free copy."""
        with twin(self.kind):
            return self.model(images)


@final
@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """Attack another model and try what was found on this one.

    The attacked model is never asked, except as the network behind a copy. Passes of the source count as passes; a
    caller's `criterion` is climbed on the source, which must have the logits that it expects. References: Papernot et
    al., 2016, https://arxiv.org/abs/1605.07277 (transfer); Athalye et al., 2018, https://arxiv.org/abs/1802.00420,
    section 4 (a smooth stand-in against gradients that are hidden).

    Attributes:
        source: `nearest`, `mean` or `float` for a copy without noise (see `quantizers.twin`), or the name of a model
            that the attacker holds. The ladder reads `*` as each of these names in turn.
        attack: What is done to the source; it must have the norm that is asked for.

    Raises:
        InputError: in the call, for a source that is neither a copy nor among `sources`.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")
    kind: ClassVar[Kind] = "transfer"

    source: str = "mean"
    attack: Attack = field(default_factory=lambda: PGD(steps=50))

    @property
    def label(self) -> str:
        """Return the source and the attack."""
        return f"from {self.source}: {self.attack.label}"

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        result = self.attack(
            source_of(problem, self.source),
            problem.images,
            problem.labels,
            epsilon=problem.epsilon,
            examples=problem.examples,
            seed=problem.child("transfer").seed,
            norm=problem.norm,
            criterion=problem.criterion,
            sources=problem.sources,
            at_once=problem.at_once,
        )
        problem.meter.add(forward=result.cost.forward, backward=result.cost.backward)
        return result.images


@final
@dataclass(frozen=True, kw_only=True)
class DIVA(Attack):
    r"""Make the quantized network err where another one, such as its unquantized copy, stays right.

    $$\max_x \; p_s(y \mid x) - c \, p_q(y \mid x)$$

    is climbed by steps of length $2.5 \epsilon / n$ from the clean image, with p the probability averaged over members
    and draws, s the source and q the model. Such images pass a check by the network that was quantized. Reference: Hao
    et al., 2022, *A Tale of Two Models: Constructing Evasive Attacks on Edge Models*, https://arxiv.org/abs/2204.10933,
    whose loss this is. Deviations: draws; the source without noise as unquantized network; the length of a step; a
    caller's `criterion` takes the place of $-p_q(y \mid x)$, the source's term stays.

    Attributes:
        source: As `Transfer` has it.
        weight: The factor c, above 0.
        steps: Number of steps.
        eot: Number of draws of each gradient; a copy without noise takes one.
        surrogate: Backward pass that the quantizers of the model show.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2")

    source: str = "float"
    weight: float = 1.0
    steps: int = 20
    eot: int = 1
    surrogate: Surrogate = field(default_factory=Surrogate)

    def __post_init__(self) -> None:
        if min(self.steps, self.eot) < 1 or self.weight <= 0:
            raise InputError(
                "expected at least one step and draw and a positive weight, got "
                f"steps={self.steps}, eot={self.eot}, weight={self.weight}"
            )

    @property
    def label(self) -> str:
        """Return DIVA with its source and budget."""
        weight = "" if self.weight == 1 else f" c={self.weight:g}"
        budget = f"{self.steps}" if self.eot == 1 else f"{self.steps}x{self.eot}"
        surrogate = f" {self.surrogate.label}" if self.surrogate.label else ""
        return f"DIVA-{budget} against {self.source}{weight}{surrogate}"

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        source = replace(problem, model=source_of(problem, self.source))
        draws = 1 if self.source in TWINS else self.eot
        right = partial(true_probability, labels=problem.labels)
        wrong = problem.criterion or (lambda logits: -right(logits))
        x, length = problem.images, problem.epsilon * 2.5 / self.steps
        for step in range(self.steps):
            seeds = problem.seeds(self.eot, "step", step)
            fooling, _ = problem.gradient(x, wrong, seeds=seeds, surrogate=self.surrogate)
            evading, _ = source.gradient(x, right, seeds=seeds[:draws])
            x = problem.ascend(x, evading + self.weight * fooling, length)
        return x


def source_of(problem: Problem, name: str) -> Model:
    """Return the model of a name: a noise-free copy of the problem's own, or one that the attacker holds.

    Raises:
        InputError: if there is none of this name.
    """
    for kind in TWINS:
        if name == kind:
            return TwinModel(model=problem.model, kind=kind)
    try:
        return problem.sources[name]
    except KeyError:
        known = ", ".join([*TWINS, *problem.sources])
        raise InputError(f"expected a source among {known}, got {name!r}; give its model in `sources`") from None


def true_probability(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    """Return the probability of the true class, averaged over draws and members.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[[[0.0, 0.0]], [[9.0, -9.0]]]])
        >>> true_probability(logits, torch.tensor([0]))
        tensor([0.7500])
    """
    return logits.softmax(-1).mean((0, 1)).gather(-1, labels[:, None])[:, 0]
