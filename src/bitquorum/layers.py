"""Wrap a torch layer or activation together with its quantizer."""

from typing import TypeAlias, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.interface import InputError
from bitquorum.quantizers import Quantizer

Weighted: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
class QuantLayer(nn.Module):
    """Apply a linear or convolution layer with quantized weights, one draw of them per seed.

    The layer keeps its full-precision weight, which the gradient reaches through the quantizer; the bias stays in
    float. Under T ambient seeds the batch holds T copies of the examples, and each copy meets weights of its own.

    Args:
        layer: An `nn.Linear` or `nn.ConvNd`; kept, not copied.
        quantizer: Of the weight.

    Raises:
        InputError: in the forward pass, if the batch is no multiple of the number of seeds.
    """

    def __init__(self, layer: Weighted, quantizer: Quantizer) -> None:
        super().__init__()
        self.layer, self.quantizer = layer, quantizer

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *out"]:
        """Return the layer's output with weights on the grid."""
        if not self.quantizer.law.stochastic:
            return self._apply_layer(x, self.quantizer(self.layer.weight))
        weights = self._weights()
        if x.shape[0] % len(weights):
            raise InputError(
                f"{self.quantizer.address or 'a layer'}: expected a batch of {len(weights)} copies of the examples, "
                f"one for each seed of the draw, got {x.shape[0]} rows; repeat the batch, or draw with one seed"
            )
        parts = x.chunk(len(weights)) if len(weights) > 1 else (x,)
        outputs = [self._apply_layer(part, weight) for part, weight in zip(parts, weights, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _weights(self) -> list[Tensor]:
        weight, ambient = self.layer.weight, rng.current()
        noise = rng.uniform_per_draw(weight, self.quantizer.address)
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
        return self.layer._conv_forward(x, weight, self.layer.bias)  # knows the padding modes


@final
class QuantActivation(nn.Module):
    """Quantize an activation.

    Where the activation is a clip, such as ReLU, the quantizer's own range does the clipping and the noise is added
    before it: the mean is then smooth at zero too. Elsewhere the activation comes first.

    Args:
        activation: The float activation.
        quantizer: Of its output.
        absorbed: Whether the quantizer's range takes the place of the activation.
    """

    def __init__(self, activation: nn.Module, quantizer: Quantizer, *, absorbed: bool) -> None:
        super().__init__()
        self.activation, self.quantizer, self.absorbed = activation, quantizer, absorbed

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *rest"]:
        """Return the activation on its grid."""
        return self.quantizer(x if self.absorbed else self.activation(x))


@final
class QuantImage(nn.Module):
    """Quantize the image before a network."""

    def __init__(self, quantizer: Quantizer, network: nn.Module) -> None:
        super().__init__()
        self.quantizer, self.network = quantizer, network

    def forward(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch classes"]:
        """Return the network's logits of the quantized image."""
        return self.network(self.quantizer(images))
