"""Bound how far a network's true logit stays above the others over a ball of images."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum.bounds.network import propagate
from bitquorum.bounds.nodes import Box, Node, least
from bitquorum.bounds.scope import Scope, networks
from bitquorum.ensemble import check_labels
from bitquorum.interface import InputError

Bound = Literal["ibp", "crown-ibp"]


def ball(images: Float[Tensor, "batch *image"], epsilon: float, scope: Scope) -> Box:
    """Return the images of [0, 1] within a radius in the maximum norm, and the rounding of an attacker's sum."""
    reach = epsilon + (2.0**-23 if scope.unit else 0.0)
    return Box(lower=(images - reach).clamp(0, 1), upper=(images + reach).clamp(0, 1))


def output(network: nn.Module, images: Float[Tensor, "batch *image"], *, epsilon: float, scope: Scope) -> Node:
    """Return the node of a network's output over the ball around each image.

    Raises:
        InputError: if a module is of a type without a rule.
    """
    return propagate(network, ball(images, epsilon, scope), scope)


def margins(
    member: nn.Module,
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    *,
    epsilon: float,
    bound: Bound = "crown-ibp",
    scope: Scope | None = None,
) -> Float[Tensor, "batch classes"]:
    r"""Return lower bounds of $z_y - z_j$ over the ball around each image, for every class j; 0 for the true class y.

    Intervals run through the network (IBP: Gowal et al., 2018, https://arxiv.org/abs/1810.12715), with the differences
    of logits folded into the last layer. `crown-ibp` also pulls lines back from there to the image, on these intervals
    (Zhang et al., 2020, https://arxiv.org/abs/1906.06316), and takes the better of the two bounds. Differentiable in
    the parameters, where rounding and noise have gradients. Deviations: lines are those of `activations.best`; pools
    that take the maximum and group norm end the way back.

    Args:
        member: A network of modules that have rules; where draws choose one of several, the least of theirs.
        images: In [0, 1]; bounds are computed in their type.
        labels: True classes.
        epsilon: Radius in the maximum norm.
        bound: `ibp` or `crown-ibp`, which costs as much as several backward passes for each class.
        scope: Draws and rounding that the bounds hold for; every draw and single precision by default.

    Raises:
        InputError: if a module is of a type without a rule, or `bound` is unknown.

    Examples:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[2.0], [0.0]])), network[1].bias.zero_()
        ...     exact = Scope(rounding=False)
        ...     margins(network, torch.full((1, 1), 0.5), torch.tensor([0]), epsilon=0.125, scope=exact)
        tensor([[0.0000, 0.7500]])
    """
    if bound not in get_args(Bound):
        raise InputError(f"expected a bound among {', '.join(get_args(Bound))}, got {bound!r}")
    if not 0 <= epsilon <= 1:
        raise InputError(f"expected a radius in [0, 1], got {epsilon}")
    scope = scope or Scope()
    found = [_margins(network, images, labels, epsilon, bound, scope) for network in networks(member, scope)]
    return torch.stack(found).amin(0)


def _margins(network: nn.Module, images: Tensor, labels: Tensor, epsilon: float, bound: Bound, scope: Scope) -> Tensor:
    node = output(network, images, epsilon=epsilon, scope=scope)
    if node.lower.dim() != 2:
        raise InputError(f"expected logits [batch, classes], got {list(node.lower.shape)}")
    check_labels(labels, node.lower.shape[1])
    everything = torch.eye(node.lower.shape[1], dtype=node.lower.dtype, device=node.lower.device)
    coefficient = everything[labels] - everything[:, None]  # [class j, batch, classes]: true minus j
    found = least(node, coefficient, deep=False)
    if bound == "crown-ibp":
        found = torch.maximum(found, least(node, coefficient, deep=True))
    return found.T
