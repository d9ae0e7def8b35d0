"""Regularize as peer defences do: diversity of outputs, agreement of input gradients, orthogonal weights."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from bitquorum.information import pairs
from bitquorum.interface import InputError
from bitquorum.layers import WEIGHTED
from bitquorum.objective.term import Step, Term


@final
@dataclass(frozen=True, kw_only=True)
class ADP(Term):
    r"""Reward a spread mean probability and members that rank the wrong classes differently.

    $$-\left(\alpha H(\bar p) + \beta \log \det (G + 10^{-6} I)\right)$$

    in nats, averaged over draws and examples. $G$ is the Gram matrix of the members' probabilities of the wrong
    classes, each vector scaled to unit length; with more members than wrong classes it is singular.

    Reference: Pang et al., 2019, ADP, https://arxiv.org/abs/1901.08846; the constant is that of the authors' code.
    Their loss adds the sum of the members' cross-entropies: `MemberCrossEntropy`, a mean, of weight M. Deviation:
    probabilities of wrong classes are renormalized before they are scaled, which changes no value and survives sure
    members. A single member keeps both parts; its Gram matrix is one.

    Attributes:
        alpha: Weight of the entropy, at least zero.
        beta: Weight of the logarithm of the determinant, at least zero.
    """

    alpha: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(alpha=self.alpha, beta=self.beta)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over draws and examples."""
        logp = step.logits.log_softmax(-1)
        mean = logp.logsumexp(1) - math.log(logp.shape[1])
        entropy = -(mean.exp() * mean).sum(-1).mean()
        diversity = log_diversity(step.logits, step.labels).mean().to(entropy.dtype)
        return -(self.alpha * entropy + self.beta * diversity)


@final
@dataclass(frozen=True, kw_only=True)
class GAL(Term):
    r"""Turn the members' input gradients apart: $\log \sum_{i<j} \exp \cos(g_i, g_j)$, $g_i = \nabla_x CE(p_i, y)$.

    It needs second derivatives.

    Reference: Kariyappa, Qureshi, 2019, gradient alignment loss, https://arxiv.org/abs/1901.09981; the weight is that
    of DVERGE's code for it, beside the mean cross-entropy of the members. Deviation: that code has leaky ReLU and adds
    noise to the images; the members here keep their activations, the images their augmentation. Norms below 1e-8 count
    as about 1e-8.
    """

    weight: float = 0.5
    needs_image_gradient: ClassVar[bool] = True

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over examples, zero for a single member."""
        if len(step.member_losses) < 2:
            return step.logits.new_zeros(())
        return cosines(_input_gradients(step)).logsumexp(0).mean()


@final
@dataclass(frozen=True, kw_only=True)
class TRS(Term):
    r"""Turn the members' input gradients across each other and keep them short.

    $$c \, \overline{|\cos(g_i, g_j)|} + \lambda \, \overline{2 \|g_m\|_2^2}, \quad g_m = \nabla_x CE(p_m, y)$$

    The first mean runs over pairs and examples, the second over members and examples. It needs second derivatives.

    Reference: Yang et al., 2021, transferability reduced smooth ensemble, https://arxiv.org/abs/2104.00671; the form
    and the factor 2 are those of the authors' code, the weights those quoted for CIFAR-10. Its loss adds the sum of
    the members' cross-entropies: `MemberCrossEntropy`, a mean, of weight M. Deviations: the norm is taken at the image
    alone, as the code does unless told otherwise, while the paper takes the largest one in a ball, found by a few
    gradient steps; and gradients are those of each example's own loss, while the code has those of the mean loss of N
    images, whose squares are N² times smaller: `smoothness / N**2` is its weight. Norms below 1e-8 count as about 1e-8
    in cosines.

    Attributes:
        similarity: The weight c, at least zero.
        smoothness: The weight lambda, at least zero.
    """

    similarity: float = 40.0
    smoothness: float = 2.5
    needs_image_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(similarity=self.similarity, smoothness=self.smoothness)

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return both parts; a single member has the second alone."""
        gradients = _input_gradients(step)
        value = self.smoothness * 2 * gradients.square().sum(-1).mean()
        if len(gradients) < 2:
            return value
        return value + self.similarity * cosines(gradients).abs().mean()


@final
@dataclass(frozen=True, kw_only=True)
class Orthogonality(Term):
    r"""Keep every layer from stretching its input: $\frac{1}{2} \sum_l \|W_l^T W_l - I\|_F^2$.

    $W_l$ is the weight as a matrix `[out, in * k * k]`. The sum runs over the weighted layers of all members and takes
    shared weights once; under a weight quantizer it sees the full-precision weight.

    Reference: Lin, Gan, Han, 2019, defensive quantization, https://arxiv.org/abs/1904.08444, eq. 8; `weight` is their
    beta. Its default is our choice. Deviation: of $W^T W$ and $W W^T$ the smaller one is taken, so that zero can be
    reached; the values differ by a constant, the gradients not. A grouped convolution counts as one matrix.
    """

    weight: float = 1e-3

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the sum over layers, zero where there is none."""
        found = (module.weight for module in step.ensemble.modules() if isinstance(module, WEIGHTED))
        weights = {id(weight): weight for weight in found}
        if not weights:
            return step.images.new_zeros(())
        return 0.5 * torch.stack([_departure(weight.flatten(1)) for weight in weights.values()]).sum()


def log_diversity(
    logits: Float[Tensor, "draw member batch classes"], labels: Int[Tensor, "batch"]
) -> Float[Tensor, "draw batch"]:
    """Return the logarithm of the determinant of the Gram matrix of `ADP`, in float64.

    Examples:
        >>> logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])[None, :, None]
        >>> log_diversity(logits, torch.tensor([0])).round(decimals=4).item()
        0.0
    """
    true = functional.one_hot(labels, logits.shape[-1]).bool()
    others = logits.masked_fill(true, -math.inf).double().softmax(-1)  # autocast leaves float64 alone
    unit = others / others.square().sum(-1, keepdim=True).sqrt()
    gram = torch.einsum("dmbc, dnbc -> dbmn", unit, unit)
    return torch.logdet(gram + 1e-6 * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype))


def cosines(gradients: Float[Tensor, "member batch pixels"]) -> Float[Tensor, "pair batch"]:
    """Return the cosine of each pair of members on each example; norms below 1e-8 count as about 1e-8.

    Examples:
        >>> cosines(torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])).flatten().tolist()
        [0.0, -1.0, 0.0]
    """
    unit = gradients / (gradients.square().sum(-1, keepdim=True) + 1e-16).sqrt()
    return torch.stack([(unit[i] * unit[j]).sum(-1) for i, j in pairs(len(unit))])


def _input_gradients(step: Step) -> Float[Tensor, "member batch pixels"]:
    gradients = [torch.autograd.grad(loss.sum(), step.images, create_graph=True)[0] for loss in step.member_losses]
    return torch.stack(gradients).flatten(2)


def _departure(matrix: Float[Tensor, "out inputs"]) -> Float[Tensor, ""]:
    low = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    with torch.autocast(device_type=matrix.device.type, enabled=False):
        gram = low @ low.mT
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().sum()


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise InputError(f"expected {name}, a finite number of at least 0, got {value}")
