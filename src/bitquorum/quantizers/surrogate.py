"""Choose, for a block of code, the gradient that every quantizer shows: an adversary's option.

The forward values never change: a surrogate alters only what flows back. `interface` knows nothing of it, so that an
attack on a network without quantizers may ask for one at no harm.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, final, get_args

from bitquorum.interface import InputError, Method

Backward = Literal["mean", "straight-through", "gumbel"]


@final
@dataclass(frozen=True, kw_only=True)
class Surrogate(Method):
    """Name the backward pass of the quantizers, for trainer and attacker alike.

    Attributes:
        backward: `mean`, the gradient of E[Q(x) | x]; `straight-through`, one inside the range and zero outside;
            `gumbel`, the gradient of a concrete relaxation at `temperature`, given the drawn code. `None` keeps each
            quantizer's own choice.
        width: Factor on the noise scale inside the gradient of the mean; above 1 it smooths (BPDA).
        temperature: Of the concrete relaxation, above zero; `None` keeps each quantizer's own.
    """

    backward: Backward | None = None
    width: float = 1.0
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.backward is not None and self.backward not in get_args(Backward):
            raise InputError(f"expected a backward among {', '.join(get_args(Backward))}, got {self.backward!r}")
        if not (self.width > 0 and (self.temperature is None or self.temperature > 0)):
            raise InputError(
                f"expected a positive width and temperature, got width={self.width}, temperature={self.temperature}"
            )

    @property
    def label(self) -> str:
        """Name what differs from the quantizers' own choices, for tables; empty if nothing does.

        Examples:
            >>> Surrogate(backward="mean", width=2.0).label
            'mean width=2'
        """
        width = "" if self.width == 1 else f"width={self.width:g}"
        temperature = "" if self.temperature is None else f"temperature={self.temperature:g}"
        return " ".join(part for part in (self.backward, width, temperature) if part)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Apply this surrogate to every quantizer called inside the block."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[Surrogate | None] = ContextVar("bitquorum_surrogate", default=None)


def ambient() -> Surrogate | None:
    """Return the surrogate of the enclosing block, if any."""
    return _CURRENT.get()
