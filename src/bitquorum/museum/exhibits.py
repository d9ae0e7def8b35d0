"""Build defences that are known to be broken, each beside the network that it leaves undefended.

Every exhibit wraps small networks, trained here on scikit-learn's digits, in the operation of its paper and in nothing
else, so that the robust accuracy of its twin, the same networks without the operation, is what an attacker who sees
through the operation gets. They are plain torch modules, as somebody else would write them. Each follows the idea of
its paper, not the paper's network, data or numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitquorum import rng
from bitquorum.data import load

EPSILON: Final = 0.125  # two of the digits' sixteen steps; the twins keep about a third of their accuracy
_EPOCHS: Final = 40
Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Exhibit:
    """Hold a broken defence.

    Attributes:
        name: For tables.
        source: The paper whose idea it is, and who broke it where that is known.
        defended: The networks in the defence.
        twin: The same networks without it.
    """

    name: str
    source: str
    defended: nn.Module
    twin: nn.Module


class Wrapped(nn.Module):
    """Run networks with operations on the image, after every hidden layer, and on the logits of all networks.

    Args:
        networks: Sequences of layers with ReLU.
        image: What is done to the image.
        hidden: What is done after every ReLU.
        combine: What is made of the logits `[networks, batch, classes]`.
    """

    def __init__(
        self,
        networks: Sequence[nn.Sequential],
        *,
        image: Operation | None = None,
        hidden: Operation | None = None,
        combine: Operation | None = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.image, self.hidden, self.combine = image, hidden, combine

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores `[batch, classes]`."""
        x = x if self.image is None else self.image(x)
        logits = torch.stack([self._run(network, x) for network in self.networks])
        return logits.mean(0) if self.combine is None else self.combine(logits)

    def _run(self, network: nn.Module, x: Tensor) -> Tensor:
        for layer in network.children():
            x = layer(x)
            if self.hidden is not None and isinstance(layer, nn.ReLU):
                x = self.hidden(x)
        return x


def stochastic_rounding(step: float = 1.5) -> Operation:
    """Return rounding to one of the two nearest multiples of a step at random, with the gradient of the identity."""
    return lambda x: x + (step * (x / step + torch.rand_like(x)).floor() - x).detach()


def noise(deviation: float) -> Operation:
    """Return the addition of Gaussian noise."""
    return lambda x: x + deviation * torch.randn_like(x)


def pruning(share: float = 3.0) -> Operation:
    """Return stochastic activation pruning: units are kept in proportion to their size and scaled up for it."""

    def prune(x: Tensor) -> Tensor:
        p = x.abs() / x.abs().sum(-1, keepdim=True).clamp(min=1e-12)
        kept = 1 - (1 - p) ** (share * x.shape[-1])
        return x * torch.bernoulli(kept) / kept.clamp(min=1e-6)

    return prune


def rounding(levels: int = 33) -> Operation:
    """Return rounding of values in [0, 1] to evenly spaced levels, without a gradient."""
    return lambda x: (x * (levels - 1)).round() / (levels - 1)


def thermometer(levels: int = 32) -> Operation:
    """Return the thermometer code of values in [0, 1], read by a layer that averages the code."""
    return lambda x: (x[..., None] > (torch.arange(levels) + 0.5) / levels).to(x.dtype).mean(-1)


def killer(x: Tensor) -> Tensor:
    """Return the values cut off from their gradient."""
    with torch.no_grad():
        return x.detach().clone()


def winners(share: float = 0.2) -> Operation:
    """Return k-winners-take-all: all but the largest share of the units are set to zero."""

    def win(x: Tensor) -> Tensor:
        count = max(1, round(share * x.shape[-1]))
        return x * (x >= x.topk(count, -1).values[..., -1:])

    return win


def random_precision(most: float = 4.0) -> Operation:
    """Return rounding of activations to a number of bits that is drawn at every call."""

    def quantize(x: Tensor) -> Tensor:
        levels = 2 ** int(torch.randint(3, 9, ())) - 1
        return (x.clamp(0, most) / most * levels).round() / levels * most

    return quantize


def vote(logits: Tensor) -> Tensor:
    """Return the share of networks that prefer each class; the first one decides among equals."""
    choices = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return choices.mean(0) + 0.1 * choices[0]


def crossmax(logits: Tensor) -> Tensor:
    """Return CrossMax scores: the largest score of each network, then of each class, is subtracted; then the median."""
    scores = logits - logits.amax(-1, keepdim=True)
    scores = scores - scores.amax(0, keepdim=True)
    return scores.median(0).values


def exhibits(names: Sequence[str] | None = None) -> list[Exhibit]:
    """Return the exhibits of some names, all by default; the networks are trained on the first call (half a minute)."""
    return [_EXHIBITS[name](name) for name in (NAMES if names is None else names)]


@lru_cache(maxsize=8)
def network(seed: int, hidden: Operation | None = None) -> nn.Sequential:
    """Return a perceptron trained on noisy digits, with an operation after each hidden layer if one is given."""
    train = load("digits", "train")
    batch = train.batch(torch.arange(len(train)))
    with rng.torch_seed(seed), torch.enable_grad():
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
        net = nn.Sequential(nn.Flatten(), *layers)
        model = Wrapped([net], hidden=hidden)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(train)).split(128):
                images = (batch.images[rows] + 0.2 * torch.randn_like(batch.images[rows])).clamp(0, 1)
                loss = F.cross_entropy(model(images), batch.labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval().requires_grad_(False)


_ROUNDING: Final = stochastic_rounding()


def _around(source: str, **operations: Operation) -> Callable[[str], Exhibit]:
    """Return the builder of one network with operations."""
    return lambda name: _exhibit(name, source, [network(0)], **operations)


def _team(source: str, combine: Operation) -> Callable[[str], Exhibit]:
    """Return the builder of three networks whose logits are combined; the twin takes their mean."""
    return lambda name: _exhibit(name, source, [network(0), network(1), network(2)], combine=combine)


def _exhibit(name: str, source: str, networks: Sequence[nn.Sequential], **operations: Operation) -> Exhibit:
    defended, twin = Wrapped(networks, **operations).eval(), Wrapped(networks).eval()
    return Exhibit(name=name, source=source, defended=defended, twin=twin)


def _rounded(name: str) -> Exhibit:
    return _exhibit(name, "stochastic rounding of activations", [network(0, _ROUNDING)], hidden=_ROUNDING)


_EXHIBITS: Final[dict[str, Callable[[str], Exhibit]]] = {
    "stochastic-rounding": _rounded,
    "additive-noise": _around(
        "Liu et al., 2018, https://arxiv.org/abs/1712.00673", image=noise(0.1), hidden=noise(0.1)
    ),
    "activation-pruning": _around(
        "Dhillon et al., 2018, https://arxiv.org/abs/1803.01442; broken in https://arxiv.org/abs/1802.00420",
        hidden=pruning(),
    ),
    "input-quantization": _around(
        "Guo et al., 2018, https://arxiv.org/abs/1711.00117; broken in https://arxiv.org/abs/1802.00420",
        image=rounding(),
    ),
    "thermometer-code": _around(
        "Buckman et al., 2018, https://openreview.net/forum?id=S18Su--CW; broken in https://arxiv.org/abs/1802.00420",
        image=thermometer(),
    ),
    "gradient-killer": _around("a forward pass cut off from its gradient", image=killer),
    "huge-logits": _around(
        "Papernot et al., 2016, https://arxiv.org/abs/1511.04508; broken in https://arxiv.org/abs/1608.04644",
        combine=lambda logits: 1e5 * logits.mean(0),
    ),
    "k-winners": _around(
        "Xiao et al., 2020, https://arxiv.org/abs/1905.10510; broken in https://arxiv.org/abs/2002.08347",
        hidden=winners(),
    ),
    "random-precision": _around(
        "Fu et al., 2021 (Double-Win Quant), random precision alone", hidden=random_precision()
    ),
    "empir-vote": _team("Sen et al., 2020, https://openreview.net/forum?id=HJem3yHKwH, its vote alone", vote),
    "crossmax": _team("Fort and Lakshminarayanan, 2024, https://arxiv.org/abs/2408.05446, its vote alone", crossmax),
}
NAMES: Final = tuple(_EXHIBITS)
