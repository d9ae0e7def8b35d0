r"""Define the noise laws of the dithered quantizer, in units of steps.

The quantizer rounds $z + e$, where $z = (x - l) / \Delta$ and $e$ follows one of these laws. With $F$ the distribution
function of $e$ and thresholds at $k + 1/2$, the mean code on $2^b$ levels is

$$M(z) = \sum_{k=0}^{2^b - 2} F(z - k - 1/2).$$

The logistic law is relaxed quantization (Louizos et al., 2019, eqs. 2-5, https://arxiv.org/abs/1810.01875); the uniform
one is stochastic rounding (Gupta et al., 2015, https://arxiv.org/abs/1502.02551). Which law the paper (arXiv
2312.00105) uses is not public; the family is our reconstruction.
"""

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from bitquorum.interface import GradientMaskingWarning, InputError, Method

WIDEST = 16.0  # the largest noise scale, in steps
# Below this share of the full slope, a quantizer hides gradients rather than removing them.
MASKING_SLOPE = 0.5


@dataclass(frozen=True, kw_only=True)
class Law(Method, ABC):
    """Describe symmetric noise in steps: how to sample it and, where it is smooth, its density and slope.

    `stochastic` says whether draws differ, `smooth` whether the mean code has a useful derivative everywhere.
    """

    stochastic: ClassVar[bool]
    smooth: ClassVar[bool]

    @abstractmethod
    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return noise in steps from uniform numbers in (0, 1)."""

    @abstractmethod
    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return $F(y)$; `y` in steps."""


@dataclass(frozen=True, kw_only=True)
class SmoothLaw(Law, ABC):
    """Add a width in steps to a law: `scale`, learned or not, never below `floor` when it is learned."""

    scale: float
    floor: float
    learned: bool = False

    stochastic: ClassVar[bool] = True
    smooth: ClassVar[bool] = True
    reach: ClassVar[float]

    def __post_init__(self) -> None:
        if not 0 < self.scale < WIDEST:
            raise InputError(f"expected a noise scale in (0, {WIDEST:g}) steps, got {self.scale}")
        if self.learned and not 0 < self.floor < self.scale:
            raise InputError(
                f"expected a floor in (0, scale) for a learned noise scale, got floor={self.floor}, scale={self.scale}"
            )
        slope = self.smallest_slope(self.floor if self.learned else self.scale)
        if slope < MASKING_SLOPE:
            warnings.warn(
                f"{self!r} is in the gradient-masking regime: between two thresholds the mean keeps only "
                f"{slope:.3f} of the full slope, so gradients vanish without any robustness being gained; "
                "widen the noise (the default scale keeps more than 0.8)",
                GradientMaskingWarning,
                stacklevel=3,
            )

    @abstractmethod
    def pdf(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return $F'(y)$ per step; may overwrite `y`."""

    @abstractmethod
    def pdf_slope(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return $F''(y)$ per squared step; may overwrite `y`."""

    def smallest_slope(self, scale: float) -> float:
        r"""Return $\min_z M'(z)$ far inside the range: it lies midway between two thresholds."""
        half = math.ceil(self.reach * scale) + 1
        y = torch.arange(-half, half, dtype=torch.float64) + 0.5
        return float(self.pdf(y, scale).sum())


@final
@dataclass(frozen=True, kw_only=True)
class Deterministic(Law):
    """Add no noise: round to nearest. The mean is a staircase, so its only gradient is a surrogate.

    Attributes:
        smooth_as: The law whose mean lends its gradient; without one it is straight-through.
    """

    smooth_as: SmoothLaw | None = None

    stochastic: ClassVar[bool] = False
    smooth: ClassVar[bool] = False

    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return zeros."""
        return torch.zeros_like(u)

    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the unit step, one half at zero."""
        return torch.heaviside(y, torch.full_like(y, 0.5))


@final
@dataclass(frozen=True, kw_only=True)
class StochasticRounding(Law):
    """Add U(-1/2, 1/2): unbiased inside the range, with variance f (1 - f) squared steps, f the fractional part."""

    stochastic: ClassVar[bool] = True
    smooth: ClassVar[bool] = False

    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return u - 1/2."""
        return u - 0.5

    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the ramp clip(y + 1/2, 0, 1)."""
        return (y + 0.5).clamp(0, 1)


@final
@dataclass(frozen=True, kw_only=True)
class Logistic(SmoothLaw):
    """Add logistic noise of scale rho steps (standard deviation 1.81 rho)."""

    scale: float = 0.25
    floor: float = 0.2
    reach: ClassVar[float] = 17.0

    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return rho log(u / (1 - u))."""
        return torch.logit(u) * scale

    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the sigmoid of y / rho."""
        return torch.sigmoid(y / scale)

    def pdf(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return s (1 - s) / rho with s the sigmoid of -|y| / rho, exact to rounding in both tails."""
        s = y.abs_().mul_(-1 / scale).sigmoid_()
        return s.addcmul_(s, s, value=-1).mul_(1 / scale)

    def pdf_slope(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return s (1 - s) (1 - 2 s) / rho^2 with s the sigmoid of y / rho."""
        sign = y.sign().neg_()
        s = y.abs_().mul_(-1 / scale).sigmoid_()
        cubic = s.mul(2).sub_(3).mul_(s).add_(1)
        return s.mul_(cubic).mul_(sign).mul_(1 / scale**2)


@final
@dataclass(frozen=True, kw_only=True)
class SmoothRounding(SmoothLaw):
    r"""Add U(-1/2, 1/2) plus logistic noise of scale rho: stochastic rounding with rounded corners at its ends.

    The sum of the thresholds telescopes, so that the mean code is
    $M(z) = \rho\,[\mathrm{softplus}(z / \rho) - \mathrm{softplus}((z - \mathrm{top}) / \rho)]$: a smooth clip, straight
    inside, for every rho; no scale masks gradients. The variance is $1/12 + \pi^2 \rho^2 / 3$ squared
    steps: at the default scale that of the default logistic law. The law is ours.
    """

    scale: float = 0.193
    floor: float = 0.02
    reach: ClassVar[float] = 17.0

    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return u - 1/2 + rho log((1 - exp(-u / rho)) / (1 - exp(-(1 - u) / rho))), the inverse of the cdf."""
        return u - 0.5 + scale * torch.log(torch.expm1(-u / scale) / torch.expm1((u - 1) / scale))

    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return rho [softplus((y + 1/2) / rho) - softplus((y - 1/2) / rho)], exact to rounding in the lower tail."""
        lower = torch.where(y <= 0, y, -y)
        tail = scale * (functional.softplus((lower + 0.5) / scale) - functional.softplus((lower - 0.5) / scale))
        return torch.where(y <= 0, tail, 1 - tail)

    def clip(self, z: Float[Tensor, "*shape"], top: int, scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the mean code, the sum of `cdf` over all thresholds."""
        return scale * (functional.softplus(z / scale) - functional.softplus((z - top) / scale))

    def pdf(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return s((1/2 - |y|) / rho) - s((-1/2 - |y|) / rho) with s the sigmoid."""
        lower = y.abs_().neg_()
        return torch.sigmoid((lower + 0.5) / scale) - torch.sigmoid((lower - 0.5) / scale)

    def pdf_slope(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return the difference of the logistic densities at y + 1/2 and y - 1/2."""
        sign = y.sign().neg_()
        lower = y.abs_().neg_()
        s, t = torch.sigmoid((lower + 0.5) / scale), torch.sigmoid((lower - 0.5) / scale)
        return (s * (1 - s) - t * (1 - t)).mul_(sign).div_(scale)


@final
@dataclass(frozen=True, kw_only=True)
class Gaussian(SmoothLaw):
    """Add normal noise with a standard deviation of `scale` steps (0.45: the variance of the default logistic law)."""

    scale: float = 0.45
    floor: float = 0.36
    reach: ClassVar[float] = 5.5

    def sample(self, u: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the normal quantile of u times the scale."""
        return torch.erfinv(2 * u - 1) * (math.sqrt(2) * scale)

    def cdf(self, y: Float[Tensor, "*shape"], scale: Tensor | float) -> Float[Tensor, "*shape"]:
        """Return the normal distribution function of y / scale, exact to rounding in the lower tail."""
        return 0.5 * torch.erfc(y * -math.sqrt(0.5) / scale)

    def pdf(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return the normal density."""
        return y.square_().mul_(-0.5 / scale**2).exp_().mul_(1 / (scale * math.sqrt(2 * math.pi)))

    def pdf_slope(self, y: Float[Tensor, "*shape"], scale: float) -> Float[Tensor, "*shape"]:
        """Return the derivative of the normal density."""
        minus_y = y.mul(-1 / scale**2)
        return self.pdf(y, scale).mul_(minus_y)
