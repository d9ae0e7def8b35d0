"""Wrap a torch layer or activation together with its quantizer, or with noise in the quantizer's place."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import kernels, rng
from bitquorum.interface import InputError
from bitquorum.quantizers import Quantizer, twin

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Transform: TypeAlias = Callable[[Tensor], Tensor]


class Noise(nn.Module, ABC):
    """Add noise to activations, or to weights in the place of a quantizer; values stay in float.

    Noise is a function of uniform numbers, which `rng` makes of the ambient draw and the module's address. Inside
    `quantizers.twin` there is none: the mean is returned, whatever the kind of the twin.
    """

    stochastic: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.address = ""

    def forward(
        self, x: Float[Tensor, "*shape"], *, noise: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """Return `x` with noise.

        Args:
            x: Values in any range.
            noise: Uniform numbers in (0, 1); drawn by `rng` for a batch of activations when omitted.
        """
        if twin.ambient():
            return self.mean(x).to(x.dtype)
        u = rng.uniform_like(kernels.wide(x.detach()), self.address) if noise is None else noise
        return self.sample(x, u).to(x.dtype)

    @abstractmethod
    def mean(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values without noise."""

    @abstractmethod
    def sample(self, x: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the values under the noise that the uniform numbers `u` stand for."""

    def fit_range(self, x: Float[Tensor, "*shape"]) -> None:
        """Fit the range, where the noise has one, to values; see `Quantizer.fit_range`."""


@final
class QuantLayer(nn.Module):
    """Apply a linear or convolution layer with quantized weights, one draw of them per seed.

    The layer keeps its full-precision weight, which the gradient reaches through the quantizer; the bias stays in
    float. Under T ambient seeds the batch holds T copies of the examples, and each copy meets weights of its own.

    Args:
        layer: An `nn.Linear` or `nn.ConvNd`; kept, not copied.
        quantizer: Of the weight; or noise that the weight gets instead.
        transform: Differentiable function of the weight, applied before the quantizer; a function of a module, so that
            the layer can be pickled. The quantizer's range is then never fitted to the weight.
        inputs: Quantizer of the layer's input, of fixed range: calibration leaves it alone.

    Raises:
        InputError: in the forward pass, if the batch is no multiple of the number of seeds.
    """

    def __init__(
        self,
        layer: Weighted,
        quantizer: Quantizer | Noise,
        *,
        transform: Transform | None = None,
        inputs: Quantizer | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.quantizer = layer, quantizer
        self.transform, self.inputs = transform, inputs

    def fit_range(self) -> None:
        """Fit the quantizer's range to the weight, unless a transform stands before it."""
        if self.transform is None:
            self.quantizer.fit_range(self.layer.weight)

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *out"]:
        """Return the layer's output with weights on the grid, or under noise."""
        if self.inputs is not None:
            x = self.inputs(x)
        if not self.quantizer.stochastic:
            return self._apply_layer(x, self.quantizer(self._weight()))
        weights = self._weights()
        if x.shape[0] % len(weights):
            raise InputError(
                f"{self.quantizer.address or 'a layer'}: expected a batch of {len(weights)} copies of the examples, "
                f"one for each seed of the draw, got {x.shape[0]} rows; repeat the batch, or draw with one seed"
            )
        parts = x.chunk(len(weights)) if len(weights) > 1 else (x,)
        outputs = [self._apply_layer(part, weight) for part, weight in zip(parts, weights, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _weight(self) -> Tensor:
        return self.layer.weight if self.transform is None else self.transform(self.layer.weight)

    def _weights(self) -> list[Tensor]:
        weight, ambient = self._weight(), rng.current()
        noise = rng.uniform_per_draw(kernels.wide(weight), self.quantizer.address)
        if ambient is None:
            return [self.quantizer(weight, noise=noise[0])]
        weights = []
        for seed, u in zip(ambient.seeds, noise, strict=True):
            with rng.draw(seed):  # whatever else the quantizer draws: the rows of a weight are no examples
                weights.append(self.quantizer(weight, noise=u))
        return weights

    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        if isinstance(self.layer, nn.Conv2d) and kernels.fits_convolution(self.layer, x):
            return kernels.convolve(self.layer, x, weight)
        return self.layer._conv_forward(x, weight, self.layer.bias)  # knows the padding modes


@final
class QuantActivation(nn.Module):
    """Quantize an activation.

    Where the activation is a clip, such as ReLU, the quantizer's own range does the clipping and the noise is added
    before it: the mean is then smooth at zero too. Elsewhere the activation comes first.

    Args:
        activation: The float activation.
        quantizer: Of its output; or noise with a range that the output gets instead.
        absorbed: Whether the quantizer's range takes the place of the activation.
    """

    def __init__(self, activation: nn.Module, quantizer: Quantizer | Noise, *, absorbed: bool) -> None:
        super().__init__()
        self.activation, self.quantizer, self.absorbed = activation, quantizer, absorbed

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Return the activation on its grid."""
        return self.quantizer(x if self.absorbed else self._activate(x))

    def _activate(self, x: Tensor) -> Tensor:
        plain_gelu = type(self.activation) is nn.GELU and self.activation.approximate == "none"
        return kernels.gelu(x) if plain_gelu and kernels.fits_gelu(x) else self.activation(x)


@final
class QuantImage(nn.Module):
    """Quantize the image before a network, or give it noise instead."""

    def __init__(self, quantizer: Quantizer | Noise, network: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.network = quantizer, network

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch classes"]:
        """Return the network's logits of the quantized image."""
        return self.network(self.quantizer(images))
