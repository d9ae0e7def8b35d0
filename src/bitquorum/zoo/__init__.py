"""Build float networks for small images; a builder is a method, a network an `nn.Sequential`."""

from bitquorum.zoo.blocks import BasicBlock, PadShortcut, PreActBlock
from bitquorum.zoo.network import ACTIVATIONS, NORMS, BatchNorm, Network, Normalize
from bitquorum.zoo.plain import CIFARconv, DigitsNet, Linear, MNISTconv
from bitquorum.zoo.residual import (
    PreActResNet18,
    ResNet18,
    ResNetCifar,
    SmallResNet,
    WideResNet,
)

__all__ = [
    "ACTIVATIONS",
    "NORMS",
    "BasicBlock",
    "BatchNorm",
    "CIFARconv",
    "DigitsNet",
    "Linear",
    "MNISTconv",
    "Network",
    "Normalize",
    "PadShortcut",
    "PreActBlock",
    "PreActResNet18",
    "ResNet18",
    "ResNetCifar",
    "SmallResNet",
    "WideResNet",
]
