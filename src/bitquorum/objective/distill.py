"""Make the members' weaknesses differ by training each on what the features of another are blind to."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.geometry import ascend, project
from bitquorum.interface import InputError
from bitquorum.layers import WEIGHTED, QuantLayer
from bitquorum.objective.term import Step, Term, cross_entropy


@final
@dataclass(frozen=True, kw_only=True)
class DVERGE(Term):
    r"""Fit the labels of images that other members take for other images: $\sum_i \sum_{j \ne i} CE(f_i(x'_j), y)$.

    The image $x'_j$ lies near $x$ and looks to layer $h_j$ of member j like another image $x_t$ of the batch:

    $$x'_j = \arg\min_{\|x' - x\|_\infty \le \epsilon} \|h_j(x') - h_j(x_t)\|_2^2$$

    by signed gradient steps from $x$, within [0, 1], on the ensemble in evaluation mode. The value is a mean over
    examples and a sum over i and j, so that the gradient in each member's own weights is the paper's, which has an
    optimizer for each member (members of shared weights get the sum). There it stands alone, after a training on clean
    images.

    Reference: Yang et al., 2020, DVERGE, https://arxiv.org/abs/2009.14720; defaults are the authors'.
    Deviations: the layer is drawn per step, not per epoch, at one relative depth in all members; it is a weighted
    layer, seen before its norm; the target comes from the same batch; the authors' code has momentum and distills in
    training mode; of mixed images the own label is fitted alone. All noise is that of the step's draw, so that x and
    x_t meet the same network.

    Attributes:
        epsilon: Radius in the maximum norm, in [0, 1].
        step_size: Length of a step in units of the image, above zero.
        steps: Number of steps, at least one.
    """

    epsilon: float = 0.07
    step_size: float = 0.007
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.epsilon <= 1 and self.step_size > 0 and self.steps >= 1):
            raise InputError(
                "expected epsilon in [0, 1], step_size above 0 and at least one step, got "
                f"{self.epsilon}, {self.step_size} and {self.steps}"
            )

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over examples of the sum over ordered pairs in nats, zero for a single member."""
        members = list(step.ensemble.members)
        if len(members) < 2:
            return step.images.new_zeros(())
        with step.attacked():
            distilled = [
                distill(step, member, epsilon=self.epsilon, step_size=self.step_size, steps=self.steps)
                for member in members
            ]
        losses = [
            _loss(step, member, images)
            for i, member in enumerate(members)
            for j, images in enumerate(distilled)
            if i != j
        ]
        return torch.stack(losses).sum()


def distill(
    step: Step, member: nn.Module, *, epsilon: float, step_size: float, steps: int
) -> Float[Tensor, "batch *image"]:
    """Return images near those of the step that a layer of the member takes for other images of the batch.

    The member is as `Step.attacked` leaves it. See `DVERGE` for the arguments.
    """
    images = step.images.detach()
    x = images
    with rng.draw(step.seed, step.examples):
        with torch.no_grad():
            outputs = weighted_outputs(member, images[partners(step)])
        layer = rng.derive(step.seed, "dverge", "layer") * len(outputs) >> 62
        target = outputs[layer]
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            distance = (weighted_outputs(member, leaf)[layer] - target).square().sum()
            (gradient,) = torch.autograd.grad(distance, leaf)
            x = project(ascend(x, gradient, -step_size, "linf"), images, epsilon, "linf")
    return x


def weighted_outputs(member: nn.Module, images: Float[Tensor, "batch *image"]) -> list[Tensor]:
    """Return what each weighted layer of a member says of the images, in order of execution.

    Raises:
        InputError: if the member calls none.

    Examples:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [tuple(output.shape) for output in weighted_outputs(network, torch.rand(5, 1, 2, 2))]
        [(5, 3), (5, 2)]
    """
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda *call: seen.append(call[-1]))
        for module in member.modules()
        if isinstance(module, (QuantLayer, *WEIGHTED))
    ]
    try:
        member(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        known = ", ".join(cls.__name__ for cls in WEIGHTED)
        raise InputError(f"expected a member that calls a layer among {known}, got none in {type(member).__name__}")
    return seen


def partners(step: Step) -> Int[Tensor, "batch"]:
    """Return for each image the place of another one: one random cycle through the batch, keyed by step and example."""
    order = rng.uniform(step.seed, step.examples, 1, address="dverge target")[:, 0].argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _loss(step: Step, member: nn.Module, images: Float[Tensor, "batch *image"]) -> Float[Tensor, ""]:
    with rng.draw(step.seed, step.examples):
        logits = member(images)
    return cross_entropy(kernels.wide(logits)[None, None], step.labels).mean()
