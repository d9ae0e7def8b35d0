"""Attack a vote as EMPIR's authors did: the weak attacks behind their published numbers, for comparison alone."""

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.attacks.base import Attack, Criterion, Problem
from bitquorum.ensemble import EmpirVote
from bitquorum.interface import InputError

Source = Literal["agreeing", "full-precision"]


@final
@dataclass(frozen=True, kw_only=True)
class EmpirAttack(Attack):
    r"""Take signed gradient steps away from what the victim predicts, as the code behind EMPIR's tables does.

    The label is the victim's prediction $v$ on the clean image by `EmpirVote`, not the true class. With
    `gradient_of="agreeing"` the loss is a cross-entropy that takes probabilities for logits, a double softmax:

    $$L(x) = CE(\mathrm{softmax}(m(x)), v), \quad
    m(x) = \frac{1}{|A|} \sum_{i \in A} \mathrm{softmax}(f_i(x)), \quad A = \{i: \arg\max f_i(x) = \mathrm{vote}(x)\}$$

    with A found anew at every step and not differentiated. With `full-precision`, and for a model of a single member,
    it is $CE(\mathrm{softmax}(f(x)), v)$ of the full-precision member f alone. The last step is returned; there is one
    restart. `FGSM` of EMPIR is `steps=1, step_size=None`, `PGD` the default, `BIM` is
    `gradient_of="full-precision", random_start=False`.

    This measures what was published, no robustness: the steps forget members that do not agree, the double softmax
    flattens the loss, and BIM is a transfer attack. A model with noise meets one draw a step.

    Reference: Sen, Ravindran, Raghunathan, EMPIR, 2020, https://arxiv.org/abs/2004.10162; attacks as in
    https://github.com/sancharisen/EMPIR, revision 7cbcbde. Deviation: the random start is cut at [0, 1] before the
    first step, not after it.

    Attributes:
        steps: Number of steps.
        step_size: Length of a step, in units of the image; `None` takes epsilon.
        random_start: Whether to start at a random point of the ball.
        gradient_of: `agreeing` or `full-precision`, the members whose gradient is followed.
        full_precision: Position of the full-precision member; -1 for the last.

    Examples:
        >>> from bitquorum.ensemble import Ensemble
        >>> linear = torch.nn.Linear(2, 2)
        >>> _ = linear.weight.data.copy_(torch.eye(2)), linear.bias.data.zero_()
        >>> attack = EmpirAttack(steps=1, step_size=None, random_start=False)
        >>> attack(Ensemble([linear]), torch.tensor([[0.6, 0.4]]), torch.tensor([1]), epsilon=0.25).images
        tensor([[0.3500, 0.6500]])
    """

    steps: int = 40
    step_size: float | None = 0.01
    random_start: bool = True
    gradient_of: Source = "agreeing"
    full_precision: int = -1

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.step_size is not None and self.step_size <= 0):
            raise InputError(
                f"expected at least one step and a positive step_size, got {self.steps} and {self.step_size}"
            )
        if self.gradient_of not in get_args(Source):
            raise InputError(f"expected gradient_of among {', '.join(get_args(Source))}, got {self.gradient_of!r}")

    @property
    def label(self) -> str:
        """Return EMPIR FGSM, PGD-steps or BIM-steps, with what differs from theirs."""
        name = f"PGD-{self.steps}" if self.random_start else f"BIM-{self.steps}"
        source, length = "agreeing" if self.random_start else "full-precision", "0.01"
        if self.steps == 1 and not self.random_start:
            name, source, length = "FGSM", "agreeing", "epsilon"
        size = "epsilon" if self.step_size is None else f"{self.step_size:g}"
        step = "" if size == length else f" step={size}"
        member = "" if self.full_precision == -1 else f" member={self.full_precision}"
        return f"EMPIR {name}{step}" + ("" if self.gradient_of == source else f" {self.gradient_of}") + member

    def _run(self, problem: Problem) -> Float[Tensor, "batch *image"]:
        criterion = problem.criterion or self._criterion(self._predicted(problem))
        length = problem.epsilon if self.step_size is None else self.step_size
        x = problem.random_point("start") if self.random_start else problem.images
        for step in range(self.steps):
            gradient, _ = problem.gradient(x, criterion, seeds=problem.seeds(1, "step", step))
            x = problem.ascend(x, gradient, length)
        return x

    def _predicted(self, problem: Problem) -> Int[Tensor, "batch"]:
        logits = problem.logits(problem.images, seeds=problem.seeds(1, "label"))
        return EmpirVote(full_precision=self.full_precision)(logits).argmax(-1)

    def _criterion(self, labels: Int[Tensor, "batch"]) -> Criterion:
        def loss(logits: Float[Tensor, "1 member batch classes"]) -> Float[Tensor, "batch"]:
            if self.gradient_of == "full-precision" or logits.shape[1] == 1:
                scores = logits[0, self.full_precision]
            else:
                scores = mean_of_agreeing(logits, full_precision=self.full_precision)
            return torch.nn.functional.cross_entropy(scores, labels, reduction="none")

        return loss


def mean_of_agreeing(
    logits: Float[Tensor, "1 member batch classes"], *, full_precision: int = -1
) -> Float[Tensor, "batch classes"]:
    """Return the mean probability of the members that prefer the class that wins the vote.

    Examples:
        >>> logits = torch.tensor([[[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 9.0]]]])
        >>> torch.equal(mean_of_agreeing(logits), logits[0, :2].softmax(-1).mean(0))
        True
    """
    winner = EmpirVote(full_precision=full_precision)(logits.detach()).argmax(-1)
    agrees = (logits[0].argmax(-1) == winner)[..., None].to(logits.dtype)
    return (agrees * logits[0].softmax(-1)).sum(0) / agrees.sum(0)
