"""Wrap a torch layer or activation together with its quantizer."""

from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.quantizers import Quantizer

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@final
class QuantLayer(nn.Module):
    """Apply a linear or convolution layer with quantized weights, one draw of them per seed.

    The layer keeps its full-precision weight, which the gradient reaches through the quantizer; its bias stays in float.
    Under T ambient seeds the batch holds T copies of the examples, and each copy meets weights of its own.

    Args:
        layer: An `nn.Linear` or `nn.ConvNd`; kept, not copied.
        quantizer: Of the weight.
    """

    def __init__(self, layer: nn.Module, quantizer: Quantizer) -> None:
        super().__init__()
        self.layer, self.quantizer = layer, quantizer

    def forward(self, x: Float[Tensor, "batch *rest"]) -> Float[Tensor, "batch *out"]:
        """Return the layer's output with weights on the grid."""
        weight = self.layer.weight
        if not self.quantizer.law.stochastic:
            return self._apply_layer(x, self.quantizer(weight))
        noise = rng.uniform_per_draw(weight, self.quantizer.address)
        parts = x.chunk(len(noise)) if len(noise) > 1 else (x,)
        outputs = [
            self._apply_layer(part, self.quantizer(weight, noise=u))
            for part, u in zip(parts, noise, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _apply_layer(self, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)  # the torch layer's own padding modes


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
