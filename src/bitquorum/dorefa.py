"""Quantize networks as DoReFa-Net and PACT do: the deterministic quantizers of the peers."""

from abc import ABC
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum.conversion import ACTIVATIONS, Conversion, rebuild
from bitquorum.interface import InputError
from bitquorum.layers import WEIGHTED, QuantActivation, QuantLayer, Weighted
from bitquorum.quantizers import Deterministic, Quantizer

_CLIP_AT_START = 10.0  # of PACT, where nothing calibrates it: wide, so that the activation starts as a plain ReLU


def unit_tanh(weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    r"""Return $\tanh(w) / \max |\tanh(w)|$, the maximum over the whole layer; the gradient flows through both.

    Examples:
        >>> unit_tanh(torch.tensor([0.0, -0.5, 1.0])).tolist()
        [0.0, -0.606..., 1.0]
    """
    squashed = weight.tanh()
    return squashed / squashed.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)


@dataclass(frozen=True, kw_only=True)
class _LowBit(Conversion, ABC):
    weight_bits: int = 4
    activation_bits: int = 4

    def __post_init__(self) -> None:
        for bits in (self.weight_bits, self.activation_bits):
            Quantizer(bits)  # refuses bits that it does not have

    @property
    def label(self) -> str:
        """The precision in short: `w4a4`."""
        return f"w{self.weight_bits}a{self.activation_bits}"


@final
@dataclass(frozen=True, kw_only=True)
class Dorefa(_LowBit):
    r"""Quantize the weights of layers and what enters them as DoReFa-Net does.

    $$w_q = 2\, q(w' / 2 + 1/2) - 1, \quad w' = \tanh(w) / \max |\tanh(w)|, \quad x_q = q(\mathrm{clip}(x, 0, 1)), \quad
    q(x) = \mathrm{round}((2^k - 1) x) / (2^k - 1)$$

    Gradients pass q straight through; that of the clip is one inside [0, 1] and zero outside. Activations, norm layers
    and biases stay as they are. Weights get as large as 1 whatever they were, so that without norm layers much of what
    enters the next layer is clipped: the formula has it so.

    Reference: Zhou et al., 2016, https://arxiv.org/abs/1606.06160, equations 5, 9 and 11, without its quantized
    gradients. With `first` it is EMPIR's (Sen et al., 2020, https://github.com/sancharisen/EMPIR,
    `Conv2D_lowprecision`): every convolution and the image are quantized, linear layers are not. Deviation: weights
    of 1 bit follow the same formula, -1 or 1, where DoReFa-Net has their signs times their mean magnitude (equation 7).

    Attributes:
        weight_bits: Bits of the weights.
        activation_bits: Bits of what enters a layer.
        first: Whether the first layer is quantized too. Its input is then the image, which is rounded on [0, 1] before
            the network's own normalization.
        linear: Whether linear layers are quantized, not convolutions alone.
        last: Whether the last layer is quantized too.
    """

    first: bool = False
    linear: bool = False
    last: bool = False

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a quantized copy of `network`."""
        names = _weighted(network)
        ends = {*(() if self.first else names[:1]), *(() if self.last else names[-1:])}

        def quantized(name: str, module: nn.Module) -> nn.Module | None:
            if not isinstance(module, WEIGHTED) or name not in names or name in ends:
                return None
            if isinstance(module, nn.Linear) and not self.linear:
                return None
            inputs = None if name == names[0] else _unit(self.activation_bits)
            return _layer(module, self.weight_bits, inputs)

        return rebuild(network, quantized, conversion=self, image=_unit(self.activation_bits) if self.first else None)


@final
@dataclass(frozen=True, kw_only=True)
class Pact(_LowBit):
    r"""Quantize activations up to a learned clipping level, and weights as DoReFa-Net does.

    $$y = \mathrm{clip}(x, 0, \alpha), \quad y_q = \mathrm{round}(y (2^k - 1) / \alpha)\, \alpha / (2^k - 1)$$

    in place of every ReLU, one $\alpha$ for each. The gradient of $\alpha$ is 1 where x >= $\alpha$ and 0 below, that
    of x is straight-through inside the range. The weights of the first and the last layer stay in full precision.

    Reference: Choi et al., 2018, https://arxiv.org/abs/1805.06085, equations 1-3. Deviations: $\alpha$ is stored as the
    logarithm of the step, so that an optimizer moves it by factors; it is set by calibration, where a trainer
    calibrates, and is not decayed; the ReLU before the last layer is quantized too.

    Attributes:
        weight_bits: Bits of the weights.
        activation_bits: Bits of the activations.

    Raises:
        InputError: in the call, for a network with other activations than ReLU.
    """

    def __call__(self, network: nn.Module) -> nn.Module:
        """Return a quantized copy of `network`."""
        names = _weighted(network)

        def quantized(name: str, module: nn.Module) -> nn.Module | None:
            if isinstance(module, WEIGHTED) and name in names[1:-1]:
                return _layer(module, self.weight_bits, None)
            return self._activation(module) if type(module) in ACTIVATIONS else None

        return rebuild(network, quantized, conversion=self)

    def _activation(self, relu: nn.Module) -> QuantActivation:
        if not isinstance(relu, nn.ReLU):
            raise InputError(f"expected ReLU activations, in whose place PACT clips, got {type(relu).__name__}")
        quantizer = Quantizer(self.activation_bits, high=_CLIP_AT_START, law=Deterministic(), learned="pact")
        return QuantActivation(relu, quantizer, absorbed=True)


def _weighted(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if type(module) in WEIGHTED]


def _unit(bits: int) -> Quantizer:
    return Quantizer(bits, high=1.0, law=Deterministic())


def _layer(layer: Weighted, bits: int, inputs: Quantizer | None) -> QuantLayer:
    quantizer = Quantizer(bits, grid="symmetric", high=1.0, law=Deterministic())
    return QuantLayer(layer, quantizer, transform=unit_tanh, inputs=inputs)
