r"""Record a network as nodes with bounds, and pull linear bounds back through them.

A node holds an interval for each of its elements. Given a coefficient $C$ on a node's value $v$, `pull` gives the
coefficients of its parents and a constant whose sum is never above $C \cdot v$: the backward step of CROWN (Zhang et
al., 2018, https://arxiv.org/abs/1811.00866).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor

Linear: TypeAlias = Callable[[Tensor], Tensor]
_ORDER = itertools.count()


class Lines(NamedTuple):
    """Hold two lines, $a x + b$ below a function on an interval and above it, for each element."""

    slope_below: Tensor
    offset_below: Tensor
    slope_above: Tensor
    offset_above: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Node(ABC):
    """Hold the interval of every element of one tensor of the network, and where the tensor comes from.

    Attributes:
        lower: Lower ends.
        upper: Upper ends.
        parents: Nodes that it is computed from.
        order: Grows in order of execution.
    """

    lower: Float[Tensor, "batch *rest"]
    upper: Float[Tensor, "batch *rest"]
    parents: tuple["Node", ...] = ()
    order: int = field(default_factory=lambda: next(_ORDER))

    @abstractmethod
    def pull(self, coefficient: Float[Tensor, "spec batch *rest"]) -> tuple[list[Tensor], Float[Tensor, "spec batch"]]:
        """Return a coefficient for each parent, and the constant."""

    @property
    def largest(self) -> Float[Tensor, "batch *rest"]:
        """The largest magnitude within each interval."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def least(self, coefficient: Float[Tensor, "spec batch *rest"]) -> Float[Tensor, "spec batch"]:
        """Return the least value of the coefficient times a point of the box."""
        return _total(coefficient.clamp(min=0) * self.lower + coefficient.clamp(max=0) * self.upper)


@final
class Box(Node):
    """End the way back: an image within its ball, or the output of an operation that has no linear bounds here."""

    def pull(self, coefficient: Float[Tensor, "spec batch *rest"]) -> tuple[list[Tensor], Float[Tensor, "spec batch"]]:
        """Return no coefficient, and the least value over the box."""
        return [], self.least(coefficient)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Affine(Node):
    """Apply a linear function of one parent, add an offset, and leave every element a radius of doubt.

    Attributes:
        linear: Linear, without an offset, and alike for every row of a batch.
        offset: Broadcasts against the value.
        radius: Broadcasts against the value; what drawn weights and rounding can add or take.
    """

    linear: Linear
    offset: Tensor
    radius: Tensor

    def pull(self, coefficient: Float[Tensor, "spec batch *rest"]) -> tuple[list[Tensor], Float[Tensor, "spec batch"]]:
        """Return the transposed function of the coefficient."""
        constant = _total(coefficient * self.offset - coefficient.abs() * self.radius)
        specs, batch = coefficient.shape[:2]
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            parent = self.parents[0].lower
            point = parent.new_zeros(specs * batch, *parent.shape[1:], requires_grad=True)
            (found,) = torch.autograd.grad(
                self.linear(point), point, coefficient.flatten(0, 1).contiguous(), create_graph=graph
            )
        return [found.unflatten(0, (specs, batch))], constant


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Elementwise(Node):
    """Apply a function to every element of one parent; its lines are computed when they are asked for.

    Attributes:
        lines: Returns lines that hold on the parent's intervals.
    """

    lines: Callable[[], Lines]

    def pull(self, coefficient: Float[Tensor, "spec batch *rest"]) -> tuple[list[Tensor], Float[Tensor, "spec batch"]]:
        """Return the slopes times the coefficient: the lower line where it is positive, else the upper one."""
        positive, negative = coefficient.clamp(min=0), coefficient.clamp(max=0)
        lines = self.lines()
        constant = _total(positive * lines.offset_below + negative * lines.offset_above)
        return [positive * lines.slope_below + negative * lines.slope_above], constant


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Sum(Node):
    """Add two parents.

    Attributes:
        radius: What rounding can add or take.
    """

    radius: Tensor

    def pull(self, coefficient: Float[Tensor, "spec batch *rest"]) -> tuple[list[Tensor], Float[Tensor, "spec batch"]]:
        """Return the coefficient for both."""
        return [coefficient, coefficient], -_total(coefficient.abs() * self.radius)


def affine(parent: Node, linear: Linear, *, reach: Tensor, offset: Tensor, radius: Tensor) -> Affine:
    """Return the node of an affine function.

    Args:
        parent: Its input.
        linear: The function without its offset.
        reach: How far the value can lie from that of the parent's midpoint, but for the radius.
        offset: Broadcasts against the value.
        radius: Broadcasts against the value.
    """
    middle = linear((parent.lower + parent.upper) / 2) + offset
    reach = reach + radius
    return Affine(
        lower=middle - reach,
        upper=middle + reach,
        parents=(parent,),
        linear=linear,
        offset=offset,
        radius=radius,
    )


def total(first: Node, second: Node, unit: float) -> Sum:
    """Return the node of a sum; `unit` is the unit of rounding."""
    radius = 2 * unit * (first.largest + second.largest)
    return Sum(
        lower=first.lower + second.lower - radius,
        upper=first.upper + second.upper + radius,
        parents=(first, second),
        radius=radius,
    )


def least(node: Node, coefficient: Float[Tensor, "spec batch *rest"], *, deep: bool) -> Float[Tensor, "spec batch"]:
    """Return a lower bound of a linear function of a node's value.

    Args:
        node: Its value is bounded.
        coefficient: Of each element of the value.
        deep: Whether bounds are pulled back to the image; else only through the affine functions at the end, where
            intervals are taken, which for a last linear layer are the usual interval bounds of margins.
    """
    waiting = {node.order: (node, coefficient)}
    bound = coefficient.new_zeros(coefficient.shape[:2])
    while waiting:
        current, pulled = waiting.pop(max(waiting))  # all that is computed from it has been seen
        if not deep and isinstance(current, Elementwise):
            bound = bound + current.least(pulled)
            continue
        parts, constant = current.pull(pulled)
        bound = bound + constant
        for parent, part in zip(current.parents, parts, strict=True):
            known = waiting.get(parent.order)
            waiting[parent.order] = (parent, part if known is None else known[1] + part)
    return bound


def _total(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2)
