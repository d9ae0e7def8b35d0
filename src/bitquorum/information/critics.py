r"""Estimate the mutual information of features by trained networks: CLUB, InfoNCE and SMILE.

Samples are split into two halves at random. A network is trained on one half, where it stops at the step that is
best on a held-out fifth, and judges the other half; the two halves change places and the terms are averaged. No
estimate is made on samples that its network has seen, so overfitting lowers a lower bound instead of raising it.
The same samples and seed give the same estimate, and torch's global generator is left alone.

The standard error is the spread of the terms, to first order in each sample, over $\sqrt{N}$. It does not hold the
bias, which is large in tens of dimensions: read `calibrate` first.
"""

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, final

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from bitquorum import rng
from bitquorum.information import _features
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.interface import InputError

_LOOK = 20  # steps from one look at the held-out samples to the next
_PATIENCE = 4  # looks without progress until training ends
_JUDGED = 2048  # samples that are judged against each other at once


@dataclass(frozen=True, kw_only=True)
class Critic(Estimator):
    """Estimate MI by a small network that is trained on one half of the samples and judges the other.

    Args:
        hidden: Width of the two hidden layers.
        steps: Steps of Adam at most.
        batch: Samples in a step.
        rate: Learning rate.
        seed: Of the split, the initial weights and the batches.
    """

    least_batch: ClassVar[int] = 1

    hidden: int = 64
    steps: int = 400
    batch: int = 256
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a field other than the seed that is not above zero, or no whole number where it counts."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and not value > 0:
                raise InputError(f"{type(self).__name__}: expected {field.name} above 0, got {value}")
            if field.name in ("hidden", "steps", "batch") and value != int(value):
                raise InputError(f"{type(self).__name__}: expected a whole number {field.name}, got {value}")

        if self.batch < self.least_batch:
            raise InputError(
                f"{type(self).__name__}: expected a batch of at least {self.least_batch}, got {self.batch}"
            )

    def __call__(self, a: Shaped[Tensor, "samples *a"], b: Shaped[Tensor, "samples *b"]) -> Estimate:
        """Return the estimate for features in the rows of `a` and `b`; at least 20 samples."""
        x, y = (side.float() for side in _features.paired(a, b, 20, type(self).__name__))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(rng.derive(self.seed, "halves")))
        halves = order.tensor_split(2)
        terms = []
        for fold, (train, judged) in enumerate((halves, halves[::-1])):
            network = self._trained(x[train], y[train], rng.derive(self.seed, fold))
            with torch.no_grad():
                parts = judged.tensor_split(math.ceil(len(judged) / _JUDGED))
                terms += [self._terms(network, x[part], y[part]).double() for part in parts]
        bits = torch.cat(terms) / math.log(2)
        error = float(bits.std()) / math.sqrt(len(bits))
        return Estimate(value=float(bits.mean()), standard_error=error, samples=len(bits))

    def _trained(self, x: Float[Tensor, "n a"], y: Float[Tensor, "n b"], seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        held, train = torch.arange(len(x)).split([len(x) // 5, len(x) - len(x) // 5])
        with rng.torch_seed(seed):
            network = self._network(x.shape[1], y.shape[1])
        optimizer = torch.optim.Adam(network.parameters(), lr=self.rate)
        best, least, since = network, math.inf, 0
        for step in range(self.steps + 1):
            if step % _LOOK == 0 or step == self.steps:
                with torch.no_grad():
                    loss = float(self._loss(network, x[held], y[held]))
                best, least, since = (copy.deepcopy(network), loss, 0) if loss < least else (best, least, since + 1)
                if since == _PATIENCE:
                    break
            chosen = train[torch.randperm(len(train), generator=generator)[: self.batch]]
            with torch.enable_grad():
                optimizer.zero_grad()
                self._loss(network, x[chosen], y[chosen]).backward()
            optimizer.step()
        return best

    @abstractmethod
    def _network(self, width_a: int, width_b: int) -> nn.Module:
        """Return an untrained network for features of these widths."""

    @abstractmethod
    def _loss(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
        """Return what training lowers."""

    @abstractmethod
    def _terms(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, "n"]:
        """Return a term of each sample, in nats: their mean is the estimate, their spread that of one sample."""


@final
@dataclass(frozen=True, kw_only=True)
class InfoNCE(Critic):
    r"""Estimate a lower bound on the MI by how well a critic tells each partner from all others.

    $$\hat I = \overline{f_{ii} - \log \frac{1}{M} \sum_j e^{f_{ij}}}$$

    with $f_{ij}$ the critic of $a_i$ and $b_j$, a scaled product of two embeddings, and M the N / 2 samples that are
    judged, at most 2048. In expectation it is a lower bound for any critic, and never above log2 M: no more than
    9.97 bits from 2,000 samples, whatever the truth. With few samples it can be negative.

    Reference: van den Oord, Li, Vinyals, 2018, representation learning with contrastive predictive coding, eq. 4,
    https://arxiv.org/abs/1807.03748; the bound is that of Poole et al., 2019, eq. 10,
    https://arxiv.org/abs/1905.06922.

    Raises:
        InputError: if a field is out of range, or the samples are not paired, floating point and finite.

    Examples:
        >>> from bitquorum.information.laws import correlated_gaussians
        >>> a, b = correlated_gaussians(1.0, 1, 1, samples=500, generator=torch.Generator().manual_seed(0))
        >>> 0.3 < InfoNCE(hidden=16, steps=200)(a, b).value < 1.2
        True
    """

    bound: ClassVar[Bound] = "lower"
    least_batch: ClassVar[int] = 2  # a sample is told from others

    def _network(self, width_a: int, width_b: int) -> nn.Module:
        return _Product(width_a, width_b, self.hidden)

    def _loss(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
        scores = network(a, b)
        return (scores.logsumexp(1) - scores.diagonal()).mean()

    def _terms(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, "n"]:
        scores = network(a, b)
        own = scores.diagonal() - scores.logsumexp(1) + math.log(len(a))
        return own - (scores.softmax(1).sum(0) - 1)


@final
@dataclass(frozen=True, kw_only=True)
class SMILE(Critic):
    r"""Estimate the MI by the Donsker-Varadhan formula with a clipped partition sum.

    $$\hat I = \overline{f_{ii}} - \log \overline{\mathrm{clip}(e^{f_{ij}}, e^{-\tau}, e^\tau)}_{i \neq j}$$

    with a critic that is trained for the Jensen-Shannon divergence. It is in the manner of a lower bound and none:
    clipping makes the partition sum too small where the critic is above $\tau$, and the sum of one critic is
    right only in the mean, so the estimate can lie above the MI. Hence `bound` is `plug-in`, and a large value proves
    nothing. Clipping buys a spread that does not grow exponentially with the MI.

    Reference: Song and Ermon, 2020, understanding the limitations of variational mutual information estimators,
    https://arxiv.org/abs/1910.06222.

    Args:
        clip: The threshold $\tau$ in nats, above 0; 1 and 5 are used in the paper.

    Raises:
        InputError: if a field is out of range, or the samples are not paired, floating point and finite.

    Examples:
        >>> from bitquorum.information.laws import correlated_gaussians
        >>> a, b = correlated_gaussians(1.0, 1, 1, samples=500, generator=torch.Generator().manual_seed(0))
        >>> 0.3 < SMILE(hidden=16, steps=200)(a, b).value < 1.4
        True
    """

    bound: ClassVar[Bound] = "plug-in"
    least_batch: ClassVar[int] = 2

    clip: float = 5.0

    def _network(self, width_a: int, width_b: int) -> nn.Module:
        return _Product(width_a, width_b, self.hidden)

    def _loss(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
        scores = network(a, b)
        own = scores.diagonal()
        others = functional.softplus(scores).sum() - functional.softplus(own).sum()
        return functional.softplus(-own).mean() + others / (len(a) * (len(a) - 1))

    def _terms(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, "n"]:
        scores = network(a, b)
        clipped = scores.clamp(-self.clip, self.clip).exp().fill_diagonal_(0.0)
        total = clipped.sum() / (len(a) * (len(a) - 1))
        influence = (clipped.sum(0) + clipped.sum(1)) / ((len(a) - 1) * total) - 2
        return scores.diagonal() - total.log() - influence


@final
@dataclass(frozen=True, kw_only=True)
class CLUB(Critic):
    r"""Estimate an upper bound on the MI by a fitted law of one variable given the other.

    $$\hat I = \overline{\log q(b_i \mid a_i)} - \overline{\log q(b_j \mid a_i)}_{ij}$$

    with q a Gaussian whose means and variances are a network of a. It is an upper bound only if q is the true
    conditional law, or nearer to it than to the marginal one; a q that is fitted badly, as from few samples or for a
    law that is not Gaussian, gives a value below the MI. Even a right q is far above the MI where that is large: for
    Gaussians of correlation $\rho$ it is $\rho^2 / (1 - \rho^2)$ nats a dimension where
    $-\log(1 - \rho^2) / 2$ are true. It is not symmetric in its variables.

    Reference: Cheng et al., 2020, a contrastive log-ratio upper bound of mutual information (variational CLUB),
    https://arxiv.org/abs/2006.12013.

    Raises:
        InputError: if a field is out of range, or the samples are not paired, floating point and finite.

    Examples:
        >>> from bitquorum.information.laws import correlated_gaussians
        >>> a, b = correlated_gaussians(0.5, 1, 1, samples=500, generator=torch.Generator().manual_seed(0))
        >>> 0.5 < CLUB(hidden=16, steps=200)(a, b).value < 2.5
        True
    """

    bound: ClassVar[Bound] = "upper"

    def _network(self, width_a: int, width_b: int) -> nn.Module:
        return _layers(width_a, self.hidden, 2 * width_b)

    def _loss(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, ""]:
        mean, log_variance = _gaussian(network, a)
        return ((b - mean).square() * (-log_variance).exp() + log_variance).sum(1).mean() / 2

    def _terms(self, network: nn.Module, a: Float[Tensor, "n a"], b: Float[Tensor, "n b"]) -> Float[Tensor, "n"]:
        mean, log_variance = (part.double() for part in _gaussian(network, a))
        b, precision = b.double(), (-log_variance).exp()
        # The log determinants cancel; sums over all pairs are sums of moments.
        own = (b - mean).square() * precision
        of_a = ((b.mean(0) - mean).square() + b.var(0, correction=0)) * precision
        of_b = b.square() * precision.mean(0) - 2 * b * (mean * precision).mean(0) + (mean.square() * precision).mean(0)
        return (of_a + of_b - of_b.mean(0) - own).sum(1) / 2


class _Product(nn.Module):
    """Score all pairs by the scaled product of two embeddings."""

    def __init__(self, width_a: int, width_b: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = _layers(width_a, hidden, hidden), _layers(width_b, hidden, hidden)

    def forward(self, a: Float[Tensor, "n a"], b: Float[Tensor, "m b"]) -> Float[Tensor, "n m"]:
        first = self.first(a)
        return first @ self.second(b).T / math.sqrt(first.shape[1])


def _layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def _gaussian(network: nn.Module, a: Float[Tensor, "n a"]) -> tuple[Tensor, Tensor]:
    """Return means and log variances, the latter within plus and minus 10."""
    mean, raw = network(a).chunk(2, 1)
    return mean, 10 * (raw / 10).tanh()
