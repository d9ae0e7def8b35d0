"""Turn float networks into randomized ones: additive noise, pruned activations, random precision, controls of SQ.

Each follows a published defence, or controls for what a stochastic quantizer does. All draw by `rng`: inside a draw the
network is a function, and a weight is drawn once per seed. Inside `quantizers.twin` there is no noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.conversion import ACTIVATIONS, Conversion, Override, Policy, rebuild, set_addresses, share_weights
from bitquorum.interface import InputError
from bitquorum.layers import WEIGHTED, Noise, QuantActivation, QuantLayer
from bitquorum.quantizers import Deterministic, Gaussian, Law, Logistic, Quantizer, SmoothLaw, twin

_NORMAL: Final = Gaussian(scale=1.0)


@final
class RangeNoise(Noise):
    r"""Clip to a quantizer's range and add normal noise of the variance that rounding would have had.

    $$y = \mathrm{clip}(x, l, h) + \Delta s\, n, \quad n \sim N(0, 1)$$

    with s^2 from `mean_variance` of the quantizer's law. The range is learned as the quantizer's is.

    Args:
        range: Holds the range and its bits; it never rounds.
    """

    def __init__(self, range: Quantizer) -> None:
        super().__init__()
        self.range = range
        self.deviation = math.sqrt(mean_variance(range.law))

    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the clipped values."""
        return self.range.clipped(x)[0]

    def sample(self, x: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the clipped values with noise, which may leave the range."""
        value, step = self.range.clipped(x)
        return value + step * _NORMAL.sample(u, self.deviation)

    def fit_range(self, x: Float[Tensor, "*shape"]) -> None:
        """Fit the range as the quantizer would."""
        self.range.fit_range(x)


def mean_variance(law: Law) -> float:
    r"""Return the variance that a quantizer's draw adds, $E_x \mathrm{Var}(Q(x) \mid x)$, in squared steps.

    x is uniform over a step far inside the range; the mean is taken over 1,000 places of it, the variance is exact. A
    learned noise scale counts as it starts.

    Examples:
        >>> from bitquorum.quantizers import Logistic, StochasticRounding
        >>> [round(mean_variance(law), 3) for law in (Logistic(), StochasticRounding(), Deterministic())]
        [0.289, 0.167, 0.0]
    """
    scale = law.scale if isinstance(law, SmoothLaw) else 1.0
    half = math.ceil(law.reach * scale) + 2 if isinstance(law, SmoothLaw) else 2
    x = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    code = torch.arange(2 * half, dtype=torch.float64)  # counted from the lowest that has a chance
    above = law.cdf(x[:, None] - (code - half + 0.5), scale)  # P(the draw exceeds the code)
    return float((((2 * code + 1) * above).sum(1) - above.sum(1).square()).mean())


@final
@dataclass(frozen=True, kw_only=True)
class GaussianControl(Conversion):
    """Put Gaussian noise of equal variance in the place of a policy's quantizers: the control of SQ.

    Every weight and activation that a `Policy` of the same fields would round stays in float, is clipped to the same
    range, learned alike, and gets the noise of `RangeNoise`: weights once per seed, activations for each element. A
    deterministic law leaves the clip alone. Differences from SQ that remain: the mean is a hard clip, where SQ's is
    smooth; the noise does not depend on x, nor shrink at the ends of the range; values may leave the range.

    Attributes:
        weight_bits: Bits of the weights whose rounding is imitated; `None` leaves them alone.
        activation_bits: Bits of the activations whose rounding is imitated; `None` leaves them alone.
        weight_law: Law of the weights that is imitated.
        activation_law: Law of the activations that is imitated.
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    weight_law: Law = field(default_factory=Logistic)
    activation_law: Law = field(default_factory=Logistic)

    def __post_init__(self) -> None:
        if self._policy.is_float:
            raise InputError("expected bits of weights or activations, whose noise is imitated, got none of either")

    @property
    def label(self) -> str:
        """The imitated precision: `gauss w4a4`."""
        return f"gauss {self._policy.label}"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` with noise where the policy would quantize."""
        converted = self._policy(network)
        for module in list(converted.modules()):
            if isinstance(module, QuantLayer | QuantActivation) and isinstance(module.quantizer, Quantizer):
                module.quantizer = RangeNoise(module.quantizer).train(module.training)
        set_addresses(converted)
        return converted

    @property
    def _policy(self) -> Policy:
        return Policy(
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            weight_law=self.weight_law,
            activation_law=self.activation_law,
        )


@final
class RandomSwitch(nn.Module):
    """Run one of several networks, chosen uniformly by the draw and the same for all of its examples.

    Under T ambient seeds the batch holds T copies of the examples, each of which goes through the network of its seed.
    Inside `quantizers.twin` the last network runs.

    Args:
        alternatives: The networks.

    Raises:
        InputError: in the forward pass, if the batch is no multiple of the number of seeds.
    """

    stochastic: ClassVar[bool] = True

    def __init__(self, alternatives: Sequence[nn.Module]) -> None:
        super().__init__()
        self.alternatives = nn.ModuleList(alternatives)
        self.address = ""

    def choice(self, seed: int) -> int:
        """Return the number of the network that runs under a seed."""
        return rng.derive(seed, "alternative", self.address) % len(self.alternatives)

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of the chosen network."""
        if twin.ambient():
            return self.alternatives[-1](images)
        ambient = rng.current() or rng.Draw(seeds=(rng.fresh_seed(),))
        count = len(ambient.seeds)
        if images.shape[0] % count:
            raise InputError(
                f"{self.address or 'a random choice'}: expected a batch of {count} copies of the examples, one for "
                f"each seed of the draw, got {images.shape[0]} rows; repeat the batch, or draw with one seed"
            )
        logits = []
        for seed, part in zip(ambient.seeds, images.chunk(count), strict=True):
            with rng.draw(seed, ambient.examples):
                logits.append(self.alternatives[self.choice(seed)](part))
        return logits[0] if count == 1 else torch.cat(logits)


@final
@dataclass(frozen=True, kw_only=True)
class RandomPrecision(Conversion):
    """Run the whole network at one precision that each draw chooses, in training and in evaluation.

    There is one set of full-precision weights; each precision has norm layers of its own (switchable batch
    normalization) and deterministic quantizers with learned ranges of its own.

    Reference: Fu, Yu, Li, Chen, Wan, Cao, Lin, Double-Win Quant, 2021, https://proceedings.mlr.press/v139/fu21c.html,
    random precision training and inference; https://github.com/GATECH-EIC/Double-Win-Quant. Deviations: ranges are
    learned (LSQ) and kept apart, theirs are running extremes that all precisions share; what is quantized is the output
    of every activation, theirs the input of every quantized convolution; shortcut convolutions are quantized, theirs
    are not.

    Attributes:
        bits: Precisions of weights and activations alike, at least two, in increasing order.
        ends: Whether the weights of the first and the last layer are quantized too; the authors leave them in float.
    """

    bits: tuple[int, ...] = (4, 5, 6, 7, 8)
    ends: bool = False

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in pairwise(self.bits))
        if len(self.bits) < 2 or not increasing or not 1 <= self.bits[0] <= self.bits[-1] <= 8:
            raise InputError(f"expected at least two increasing precisions in [1, 8], got {self.bits}")

    @property
    def label(self) -> str:
        """The precisions in short: `w4-8a4-8`, or `w2+4a2+4` where they leave gaps."""
        gaps = len(self.bits) <= self.bits[-1] - self.bits[0]
        bits = "+".join(map(str, self.bits)) if gaps else f"{self.bits[0]}-{self.bits[-1]}"
        return f"w{bits}a{bits}"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a `RandomSwitch` of copies of `network` that share their weights."""
        alternatives = [self._policy(bits)(network) for bits in self.bits]
        share_weights(alternatives)
        switch = RandomSwitch(alternatives)
        set_addresses(switch)
        return switch

    def _policy(self, bits: int) -> Policy:
        ends = () if self.ends else (Override(pattern="first"), Override(pattern="last"))
        return Policy(
            weight_bits=bits,
            activation_bits=bits,
            weight_law=Deterministic(),
            activation_law=Deterministic(),
            overrides=ends,
        )


@final
class Pruning(Noise):
    r"""Keep units at random, the large ones more often, scaled so that the mean stays; in evaluation mode alone.

    $$y_i = x_i B_i / q_i, \quad B_i \sim \mathrm{Bernoulli}(q_i), \quad q_i = 1 - (1 - p_i)^r, \quad
    p_i = |x_i| / \sum_j |x_j|$$

    over the units of one example, with r `share` times their number. The gradient is $B_i / q_i$, whose mean is that of
    the mean.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values."""
        return x

    def sample(self, x: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the kept values, scaled up."""
        if self.training:
            return x
        with torch.no_grad():
            size = x.flatten(1).abs().to(u.dtype)
            total = size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
            kept = -torch.expm1(self.share * size.shape[1] * torch.log1p(-size / total))
            factor = torch.where(u.flatten(1) < kept, 1 / kept, 0.0).view_as(x)
        return x * factor

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"share={self.share}"


@final
@dataclass(frozen=True, kw_only=True)
class ActivationPruning(Conversion):
    """Prune activations at random at evaluation: stochastic activation pruning (SAP).

    Reference: Dhillon et al., 2018, https://arxiv.org/abs/1803.01442, algorithm 1. Deviation: units are kept
    independently with the probability of being drawn at least once in r draws with replacement; there, one unit kept
    makes others less likely.

    Attributes:
        share: Draws r as a share of the units of a layer; the paper has 100 % and less.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise InputError(f"expected a finite share above 0, got {self.share}")

    @property
    def label(self) -> str:
        """Full precision and the method: `fp sap`."""
        return "fp sap"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` with pruning behind every activation."""
        return rebuild(
            network,
            lambda _, module: nn.Sequential(module, Pruning(self.share)) if type(module) in ACTIVATIONS else None,
            conversion=self,
        )


@final
class WeightScaledNoise(Noise):
    r"""Add normal noise of a learned multiple of the standard deviation of the values: $x + \alpha \sigma(x) n$.

    No gradient flows through $\sigma$.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(initial)))

    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values."""
        return x

    def sample(self, x: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values with noise."""
        return x + self.alpha * x.detach().std() * _NORMAL.sample(u, 1.0)


@final
@dataclass(frozen=True, kw_only=True)
class WeightNoise(Conversion):
    """Add noise of learned strength to the weights, in training and evaluation: parametric noise injection (PNI-W).

    Reference: He, Rakin, Fan, 2019, https://arxiv.org/abs/1811.09310, equations 1-4, one alpha per layer;
    https://github.com/elliothe/CVPR_2019_PNI. The paper trains it adversarially, which is the objective's matter here.
    Deviation: the trainer decays no alpha.

    Attributes:
        initial: Alpha at the start, in standard deviations of the layer's weights.
    """

    initial: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.initial < math.inf:
            raise InputError(f"expected a finite initial strength above 0, got {self.initial}")

    @property
    def label(self) -> str:
        """Full precision and the method: `fp pni`."""
        return "fp pni"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` whose convolutions and linear layers draw their weights."""

        def noisy(_: str, module: nn.Module) -> nn.Module | None:
            if not isinstance(module, WEIGHTED) or type(module) not in WEIGHTED:
                return None
            return QuantLayer(module, WeightScaledNoise(self.initial))

        return rebuild(network, noisy, conversion=self)


@final
class AddedNoise(Noise):
    """Add normal noise of a fixed standard deviation, in units of the values."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values."""
        return x

    def sample(self, x: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values with noise."""
        return x + _NORMAL.sample(u, self.deviation)

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        return f"deviation={self.deviation}"


@final
@dataclass(frozen=True, kw_only=True)
class LayerNoise(Conversion):
    """Add noise to the input of every convolution, in training and evaluation: random self-ensemble (RSE).

    Reference: Liu, Cheng, Zhang, Hsieh, 2018, https://arxiv.org/abs/1712.00673, section 3; the mean probability over
    several draws, which the paper predicts by, is an ensemble's `passes`.

    Attributes:
        image: Standard deviation before the first convolution, in units of its input: behind the network's own
            normalization, where it has one.
        inner: Standard deviation before every other convolution.
    """

    image: float = 0.2
    inner: float = 0.1

    def __post_init__(self) -> None:
        if not (0 <= self.image < math.inf and 0 <= self.inner < math.inf and self.image + self.inner > 0):
            raise InputError(
                "expected finite standard deviations of at least 0, one of them above 0, got "
                f"image={self.image}, inner={self.inner}"
            )

    @property
    def label(self) -> str:
        """Full precision and the method: `fp rse`."""
        return "fp rse"

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a copy of `network` with noise before every convolution."""
        kinds = WEIGHTED[1:]
        names = [name for name, module in network.named_modules() if type(module) in kinds]

        def noisy(name: str, module: nn.Module) -> nn.Module | None:
            if type(module) not in kinds:
                return None
            return nn.Sequential(AddedNoise(self.image if name == names[0] else self.inner), module)

        return rebuild(network, noisy, conversion=self)
