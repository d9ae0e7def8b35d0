"""Quantize a tensor to a low-bit grid, at random or not, with a useful gradient."""

import math
from typing import Literal, final, get_args

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.interface import InputError
from bitquorum.quantizers import twin
from bitquorum.quantizers.concrete import Concrete, probabilities
from bitquorum.quantizers.laws import WIDEST, Deterministic, Law, Logistic, SmoothLaw
from bitquorum.quantizers.mean import LAWS, SMOOTH, attach_mean, mean_code
from bitquorum.quantizers.surrogate import Backward, Surrogate, ambient

Grid = Literal["one-sided", "two-sided", "symmetric"]


@final
class Quantizer(nn.Module):
    r"""Quantize to $2^b$ levels by dithered rounding.

    $$Q(x) = l + \Delta \, \mathrm{clip}(\mathrm{round}((x - l) / \Delta + e), 0, 2^b - 1)$$

    Forward values lie exactly on the grid: they are built from the integer code. The gradient of `mean` is that of
    $E[Q(x) \mid x]$ in $x$, with an exact second derivative. Learned parameters get these gradients: the step through
    the drawn code plus through $z$ (its expectation is the gradient of the mean), scaled by
    $1 / \sqrt{n (2^b - 1)}$ as in LSQ (Esser et al., 2020, https://arxiv.org/abs/1902.08153, section 2.2); the noise
    scale through the mean. Deviations from LSQ: the step is stored as a logarithm, and $n$
    counts the elements of the whole batch, not of one example.

    Reference: Louizos et al., 2019, https://arxiv.org/abs/1810.01875, eqs. 2-5, for the logistic law. The gradient of
    the closed-form mean beside a hard forward pass is our choice.

    Args:
        bits: Number of bits, 1 to 8.
        grid: `one-sided` (levels from 0 to `high`), `two-sided` (from `low` to `high`), `symmetric` (from `-high` to
            `high`, an even number of levels, none at zero).
        low: Lowest level of a two-sided grid, in units of the input.
        high: Highest level, in units of the input.
        law: Noise law, in steps.
        learned: Whether the range is a parameter. `pact`, for a one-sided grid with one range, gives it the gradient of
            PACT instead: that of `high` is 1 where x >= `high` and 0 below, unscaled, whatever the rounding (Choi et
            al., 2018, https://arxiv.org/abs/1805.06085, equation 3).
        channels: Number of channels with a range each; `None` for one range per tensor.
        axis: Dimension of the channels.
        backward: Gradient; `None` takes `mean` for a law with noise and `straight-through` for the deterministic one.
        temperature: Of the concrete relaxation, when `backward` is `gumbel`.

    Raises:
        InputError: if an argument lies outside its range, or if the gradient of a staircase is asked for.

    Examples:
        >>> quantize = Quantizer(2, high=3.0, law=Deterministic())
        >>> quantize(torch.tensor([0.25, 1.6, 9.0]))
        tensor([0., 2., 3.])
        >>> quantize.levels()
        tensor([0., 1., 2., 3.])
        >>> sq = Quantizer(2, high=3.0)
        >>> sq(torch.tensor([1.5]), noise=torch.tensor([0.9])), sq.mean(torch.tensor([1.5]))
        (tensor([2.]), tensor([1.5000]))
    """

    log_step: Tensor
    fixed_step: Tensor
    low: Tensor
    raw_scale: Tensor

    def __init__(
        self,
        bits: int,
        *,
        grid: Grid = "one-sided",
        low: float = 0.0,
        high: float = 1.0,
        law: Law | None = None,
        learned: bool | Literal["pact"] = False,
        channels: int | None = None,
        axis: int = 1,
        backward: Backward | None = None,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        self.law: Law = Logistic() if law is None else law
        _check(bits, grid, low, high, channels, self.law, backward)
        self.pact = isinstance(learned, str)
        if self.pact and (learned, grid, channels) != ("pact", "one-sided", None):
            raise InputError(
                "expected learned to be true, false, or pact with a one-sided grid and one range, got "
                f"{learned!r} with grid={grid!r}, channels={channels}"
            )
        self.bits, self.top, self.grid, self.axis = bits, 2**bits - 1, grid, axis
        smooth = self.law.stochastic or (isinstance(self.law, Deterministic) and self.law.smooth_as is not None)
        default: Backward = "mean" if smooth else "straight-through"
        self.surrogate = Surrogate(backward=backward or default, temperature=temperature)
        self.temperature = temperature
        self.address = ""
        self.learned = bool(learned)
        shape = () if channels is None else (channels,)
        width = 2 * high if grid == "symmetric" else high - (low if grid == "two-sided" else 0.0)
        self._store("log_step", torch.full(shape, math.log(width / self.top)), parameter=self.learned)
        if grid == "two-sided":
            self._store("low", torch.full(shape, float(low)), parameter=self.learned)
        # A fixed range keeps the exact step beside its logarithm, so that 1/255 means 1/255.
        if not learned:
            self.register_buffer("fixed_step", torch.full(shape, width / self.top))
        if isinstance(self.law, SmoothLaw) and self.law.learned:
            self.raw_scale = nn.Parameter(torch.tensor(math.log(self.law.scale - self.law.floor)))

    def forward(
        self, x: Float[Tensor, "*shape"], *, noise: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Return `x` on the grid.

        Args:
            x: Values in any range.
            noise: Uniform numbers in (0, 1); drawn by `rng` for a batch of activations when omitted.
        """
        kind = twin.ambient()
        fused = None if noise is not None else self._fused(x, kind)
        if fused is not None:
            return fused
        z, low, step = self._steps(x)
        if kind:
            code = self._without_noise(z, kind)
        else:
            code = self._draw(z.detach(), noise)
            if torch.is_grad_enabled() and (z.requires_grad or self._scale_is_learned):
                code = self._attach_gradient(code, z)
        value = self._decode(code, low, step)
        if self.pact:
            high = self.log_step.exp() * self.top
            value = value + (high - high.detach()) * (z >= self.top)
        return value.to(x.dtype)

    def clipped(self, x: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Tensor]:
        """Return `x` clipped to the range but not rounded, and the step, which broadcasts against it.

        Both have the gradients that a learned range has in rounding.
        """
        z, low, step = self._steps(x)
        return self._decode(z.clamp(0, self.top), low, step).to(x.dtype), step

    def codes(
        self, x: Float[Tensor, "*shape"], *, noise: Float[Tensor, "*shape"] | None = None
    ) -> Integer[Tensor, "*shape"]:
        """Return the integer codes in [0, 2**bits - 1] as uint8; `decode` gives the values."""
        with torch.no_grad():
            return self._draw(self._steps(x)[0], noise).to(torch.uint8)

    def decode(self, codes: Int[Tensor, "*shape"] | Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the level of each code, equal bit for bit to what `forward` returns for it."""
        reference = self.log_step.new_empty((1,) * codes.dim())
        low, step = self._range(reference)
        return self._decode(codes.to(step.dtype), low, step).detach()

    def levels(self) -> Float[Tensor, "levels"] | Float[Tensor, "channels levels"]:
        """Return the grid: [2**bits], or [channels, 2**bits]."""
        codes = torch.arange(self.top + 1, device=self.log_step.device, dtype=self.log_step.dtype)
        low, step = self._base()
        low = low[..., None] if isinstance(low, Tensor) else low
        return self._decode(codes, low, step[..., None]).detach()

    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return E[Q(x) | x] in closed form, differentiable to any order under a law with noise."""
        z, low, step = self._steps(x)
        return self._decode(mean_code(z, self.top, self.law, self.scale()), low, step).to(x.dtype)

    def probabilities(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape levels"]:
        """Return P(k | x) for every level k, differentiable under a law with noise."""
        return probabilities(self._steps(x)[0], self.top, self.law, self.scale())

    def entropy(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return H(Q(x) | x) in bits for each element: the noise that a draw adds."""
        return _entropy(self.probabilities(x))

    def rate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
        """Return I(x; Q(x)) in bits, exactly, for x uniform over the given elements."""
        p = self.probabilities(x).flatten(0, -2)
        return _entropy(p.mean(0)) - _entropy(p).mean()

    def scale(self) -> Float[Tensor, ""] | float:
        """Return the noise scale in steps; a learned one never falls below its floor, nor leaves the law's range."""
        if not isinstance(self.law, SmoothLaw):
            return 1.0
        if not self.law.learned:
            return self.law.scale
        return self.law.floor + self.raw_scale.clamp(max=math.log(WIDEST - self.law.floor)).exp()

    @torch.no_grad()
    def fit_range(self, x: Float[Tensor, "*shape"], *, candidates: int = 40) -> None:
        """Set the range that gives deterministic rounding of `x` the least mean squared error.

        The search covers `candidates` fractions of the largest magnitude, per channel where there are channels. A
        two-sided grid keeps the smallest value of `x` as its lowest level. Where a one- or two-sided grid would shrink
        to a point, as behind a dead unit, the step stays as it is.

        Raises:
            InputError: if `x` is empty or not finite.
        """
        flat = x.detach().float()
        if not (flat.numel() and bool(flat.isfinite().all())):
            raise InputError(
                f"{self.address or 'a quantizer'}: expected finite values to fit a range to, got "
                f"{'NaN or infinity' if flat.numel() else 'none'}; check the weights and the calibration images"
            )
        flat = flat.reshape(1, -1) if self.log_step.dim() == 0 else flat.movedim(self.axis, 0).flatten(1)
        low = flat.amin(1) if self.grid == "two-sided" else torch.zeros(len(flat), device=flat.device)
        reach = (flat.abs() if self.grid == "symmetric" else flat - low[:, None]).amax(1)
        flat_grid = (reach <= 0) & (self.grid != "symmetric")
        reach = reach.clamp(min=1e-8)
        best = torch.full_like(reach, torch.inf)
        chosen = reach.clone()
        for fraction in torch.linspace(1 / candidates, 1, candidates).tolist():
            step = reach * fraction * (2 if self.grid == "symmetric" else 1) / self.top
            start = -reach * fraction if self.grid == "symmetric" else low
            code = ((flat - start[:, None]) / step[:, None]).round().clamp(0, self.top)
            target = flat.clamp(min=0) if self.grid == "one-sided" else flat
            error = (start[:, None] + step[:, None] * code - target).square().mean(1)
            chosen, best = torch.where(error < best, step, chosen), torch.minimum(error, best)
        chosen = torch.where(flat_grid, self._base()[1].to(chosen), chosen)
        self.log_step.copy_(chosen.log().view_as(self.log_step))
        if not self.learned:
            self.fixed_step.copy_(chosen.view_as(self.fixed_step))
        if self.grid == "two-sided":
            self.low.copy_(low.view_as(self.low))

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        channels = "" if self.log_step.dim() == 0 else f", channels={len(self.log_step)}"
        return f"bits={self.bits}, grid={self.grid}, learned={self.learned}{channels}, law={self.law}"

    @property
    def stochastic(self) -> bool:
        """Whether two draws can differ."""
        return self.law.stochastic

    @property
    def _scale_is_learned(self) -> bool:
        return isinstance(self.law, SmoothLaw) and self.law.learned

    def _store(self, name: str, value: Tensor, *, parameter: bool) -> None:
        if parameter:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _base(self) -> tuple[Tensor | float, Tensor]:
        step = self.log_step.exp() if self.learned else self.fixed_step
        if self.grid == "two-sided":
            return self.low, step
        return (-step * (self.top / 2) if self.grid == "symmetric" else 0.0), step

    def _range(self, x: Tensor) -> tuple[Tensor | float, Tensor]:
        """Return the lowest level and the step, shaped to broadcast against `x`."""
        low, step = self._base()
        if self.pact:
            step = step.detach()
        elif self.learned and torch.is_grad_enabled():
            factor = self._step_factor(x)
            step = _ScaleGradient.apply(step, factor)
            if self.grid == "two-sided":
                low = _ScaleGradient.apply(low, factor)
            elif self.grid == "symmetric":
                low = -step * (self.top / 2)
        if self.log_step.dim() == 0:
            return low, step
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return (low.view(shape) if isinstance(low, Tensor) else low), step.view(shape)

    def _step_factor(self, x: Tensor) -> float:
        groups = max(1, self.log_step.numel())
        return 1 / math.sqrt(max(1, x.numel() // groups) * self.top)

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """Return `x` in steps above the lowest level, and `_range`; half precision is widened first."""
        low, step = self._range(x)
        return (kernels.wide(x) - low) / step, low, step

    def _decode(self, code: Tensor, low: Tensor | float, step: Tensor) -> Tensor:
        if self.grid == "symmetric":
            return (code - self.top / 2) * step
        return code * step if self.grid == "one-sided" else low + code * step

    def _draw(self, z: Tensor, noise: Tensor | None) -> Tensor:
        if not self.law.stochastic:
            return z.clamp(0, self.top).round_()
        scale = self.scale()
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        name = LAWS.get(type(self.law))
        if noise is None and name is not None:
            return kernels.draw(rng.row_keys(z, self.address), z, law=name, top=self.top, scale=scale)
        u = rng.uniform_like(z, self.address) if noise is None else noise
        return self.law.sample(u, scale).add_(z).clamp_(0, self.top).round_()

    def _without_noise(self, z: Tensor, kind: twin.Twin) -> Tensor:
        if kind == "mean":
            law, scale = self._shown_law()
            if isinstance(scale, Tensor) or not isinstance(law, SmoothLaw):
                return mean_code(z, self.top, law, scale)
            return attach_mean(mean_code(z.detach(), self.top, law, scale), z, self.top, law, scale)
        inside = z.clamp(0, self.top)
        return inside if kind == "float" else inside.detach().round() + (inside - inside.detach())

    def _shown_law(self) -> tuple[Law, Tensor | float]:
        """Return the law whose mean is shown, and its scale: a quantizer without noise shows a smooth stand-in."""
        if isinstance(self.law, Deterministic):
            law = self.law.smooth_as or Logistic()
            return law, law.scale
        return self.law, self.scale()

    def _fused(self, x: Tensor, kind: twin.Twin | None) -> Tensor | None:
        """Return the values in one pass, where there is one."""
        if kind:
            return self._fused_mean(x) if kind == "mean" else None
        return self._fused_symmetric(x) if self.grid == "symmetric" else self._fused_draw(x)

    def _fused_symmetric(self, x: Tensor) -> Tensor | None:
        """Round straight-through to symmetric grids that are trained, as weights are."""
        chosen = ambient() or self.surrogate
        straight = (chosen.backward or self.surrogate.backward) == "straight-through"
        nearest = isinstance(self.law, Deterministic)
        channels_first = self.log_step.dim() == 0 or (self.axis == 0 and x.dim() > 1)
        if not (straight and nearest and channels_first and self.learned and kernels.applies(x)):
            return None
        step = self.log_step.exp()
        return kernels.round_symmetric(x, step, top=self.top, factor=self._step_factor(x))

    def _fused_draw(self, x: Tensor) -> Tensor | None:
        """Draw, or round to nearest, over one range, with the gradient of a smooth mean or straight-through."""
        scale, name = self.scale(), LAWS.get(type(self.law))
        nearest = isinstance(self.law, Deterministic)
        grid = self._gradient_grid()
        if grid is None or isinstance(scale, Tensor) or not (name or nearest):
            return None
        if not kernels.fits_quantization(x, grid):
            return None
        if name is None:
            return kernels.round_nearest(x, *self._range_tensors(x), grid)
        drawn = kernels.Noise(law=name, scale=scale)
        return kernels.quantize(x, rng.row_keys(x, self.address), *self._range_tensors(x), drawn, grid)

    def _fused_mean(self, x: Tensor) -> Tensor | None:
        """Return the mean of a law with a smooth one, over one range."""
        grid = self._mean_grid(*self._shown_law())
        if grid is None or not kernels.fits_expectation(x, grid):
            return None
        return kernels.expect(x, *self._range_tensors(x), grid)

    def _gradient_grid(self) -> kernels.MeanCode | None:
        """Return what names the mean that `_attach_gradient` takes, or `None` where none is known."""
        chosen = ambient() or self.surrogate
        backward = chosen.backward or self.surrogate.backward
        if backward == "mean":
            law, scale = self._shown_law()
            if isinstance(law, SmoothLaw):
                return self._mean_grid(law, scale * chosen.width)
        gumbel = backward == "gumbel" and self.law.stochastic
        return None if gumbel or not self._one_range else kernels.MeanCode(law="clip", top=self.top)

    def _mean_grid(self, law: Law, scale: Tensor | float) -> kernels.MeanCode | None:
        """Return what names the mean in one pass, or `None` where none is known: a smooth law over one range."""
        name = SMOOTH.get(type(law))
        if name is None or isinstance(scale, Tensor) or not self._one_range:
            return None
        return kernels.MeanCode(law=name, top=self.top, scale=scale)

    @property
    def _one_range(self) -> bool:
        return not (self.pact or self.grid == "symmetric" or self.log_step.dim())

    def _range_tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, step = self._range(x)
        return low if isinstance(low, Tensor) else torch.zeros_like(step), step

    def _attach_gradient(self, code: Tensor, z: Tensor) -> Tensor:
        chosen = ambient() or self.surrogate
        backward = chosen.backward or self.surrogate.backward
        law, scale = self._shown_law() if backward == "mean" else (self.law, self.scale())  # a stand-in is BPDA
        if backward == "gumbel" and law.stochastic:
            concrete = Concrete(law=law, scale=scale, top=self.top, temperature=chosen.temperature or self.temperature)
            return concrete.attach(code, z, rng.row_keys(z, self.address + "/gumbel"))
        if backward == "mean" and isinstance(law, SmoothLaw):
            if not isinstance(scale, Tensor):
                return attach_mean(code, z, self.top, law, scale * chosen.width)
            mean = mean_code(z, self.top, law, scale * chosen.width)
            return code + (mean - mean.detach())
        inside = z.clamp(0, self.top)  # the mean of stochastic rounding, and straight-through for every law
        return code + (inside - inside.detach())


class _ScaleGradient(torch.autograd.Function):
    """Return the input, and its gradient times a factor."""

    @staticmethod
    def forward(ctx: object, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None  # type: ignore[attr-defined]


def _entropy(p: Tensor) -> Tensor:
    """Return the entropy over the last dimension in bits; the clamp keeps the gradient finite where p is zero."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log2()).sum(-1)


def _check(bits: int, grid: str, low: float, high: float, channels: int | None, law: Law, backward: str | None) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"expected bits to be an integer in [1, 8], got {bits!r}")
    if grid not in get_args(Grid):
        raise InputError(f"expected a grid among {', '.join(get_args(Grid))}, got {grid!r}")
    bottom = low if grid == "two-sided" else 0.0
    if not (math.isfinite(low) and math.isfinite(high) and bottom < high):
        raise InputError(f"expected finite numbers with {bottom} < high, got low={low}, high={high}")
    if channels is not None and channels < 1:
        raise InputError(f"expected at least one channel, got {channels}")
    if isinstance(law, Deterministic) and backward in ("gumbel", *(("mean",) if law.smooth_as is None else ())):
        raise InputError(
            f"expected straight-through for a deterministic quantizer, got backward={backward!r}: its mean is a "
            "staircase, whose gradient is zero almost everywhere; choose a law with noise instead, or smooth_as"
        )
