"""Say for which draws, and for which arithmetic, a bound has to hold; and what a draw can then be."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.conversion import alternatives
from bitquorum.interface import InputError
from bitquorum.layers import Noise
from bitquorum.quantizers import Quantizer
from bitquorum.randomized import RandomSwitch

Validity = Literal["all", "fresh", "nearest"]

# Kernels make uniform numbers of 23 bits k as (k + 1/2) / 2^23.
SMALLEST: Final = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Say what a bound holds for.

    Attributes:
        validity: `all`: every draw that the generator can make, at every image of the ball. `fresh`: the one draw of
            the enclosing `rng.draw`, which is frozen then: one draw's network is a deterministic function. `nearest`:
            the network without noise that rounds to nearest, another defence than the one that draws.
        rounding: Whether bounds are widened by what single precision can round away or up.
    """

    validity: Validity = "all"
    rounding: bool = True

    def __post_init__(self) -> None:
        if self.validity not in get_args(Validity):
            raise InputError(f"expected a validity among {', '.join(get_args(Validity))}, got {self.validity!r}")

    @property
    def unit(self) -> float:
        """The unit of rounding that bounds allow for: that of single precision, or zero."""
        return 2.0**-24 if self.rounding else 0.0

    def noise(self, x: Tensor, address: str, *, parameter: bool = False) -> tuple[Tensor, Tensor]:
        """Return the least and the largest uniform number that each element of `x` can draw.

        Noise grows with it: a law's sample is its quantile, and the middle of a symmetric law is no noise.

        Raises:
            InputError: if one draw is asked for outside of one, or inside of several.
        """
        if self.validity == "nearest":
            middle = torch.full_like(x, 0.5)
            return middle, middle
        if self.validity == "all":
            return torch.full_like(x, SMALLEST), torch.full_like(x, 1 - SMALLEST)
        seed_of(self)
        u = rng.uniform_per_draw(x.detach(), address)[0] if parameter else rng.uniform_like(x.detach(), address)
        return u, u


def seed_of(scope: Scope) -> int | None:
    """Return the seed of the enclosing draw where the scope is one draw; else none.

    Raises:
        InputError: if one draw is asked for outside of one, or inside of several.
    """
    if scope.validity != "fresh":
        return None
    ambient = rng.current()
    if ambient is None or len(ambient.seeds) != 1:
        raise InputError("expected bounds of one draw inside `rng.draw` with one seed, got none or several")
    return ambient.seeds[0]


def networks(member: nn.Module, scope: Scope) -> list[nn.Module]:
    """Return the networks that can run in the scope: of several `alternatives`, those that a draw can choose."""
    chosen = alternatives(member)
    if not isinstance(member, RandomSwitch) or scope.validity == "all":
        return chosen
    seed = seed_of(scope)
    return [chosen[-1 if seed is None else member.choice(seed)]]


def noise_of(module: Quantizer | Noise, scope: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the uniform numbers of `Scope.noise`; a quantizer without noise takes any."""
    return Scope(validity="nearest").noise(x, "") if not module.stochastic else scope.noise(x, module.address)
