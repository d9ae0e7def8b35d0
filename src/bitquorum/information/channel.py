r"""Compute what a noisy output says about its source, from the law of the output given each source.

Both functions are one formula, $H(\bar p) - \overline{H(p)}$, the MI of a source that is picked uniformly and the
outcome: exact, differentiable and at least zero. `bald` takes the draws of a network as sources, per image, and
`channel_rate` the inputs of a quantizer.
"""

from jaxtyping import Float
from torch import Tensor

from bitquorum.information import _check
from bitquorum.information.tables import xlog2x


def bald(probabilities: Float[Tensor, "views *batch classes"]) -> Float[Tensor, "*batch"]:
    r"""Compute for each input the MI of the prediction and the view that made it (BALD).

    $$I(\hat y; v \mid x) = H\left(\frac{1}{V} \sum_v p_v\right) - \frac{1}{V} \sum_v H(p_v)$$

    It is high where the views are sure of different classes and zero where they agree, however unsure they are.

    Args:
        probabilities: The predictive distributions of each view, which is a member, a draw of the noise or a pair
            of both; each sums to one over the classes. For logits do `logits.softmax(-1)`.

    Returns:
        The MI in bits, in [0, min(log2 V, log2 C)], in float32 or wider. With V draws of a noise it is that of
        these draws: it is low by what more draws would add.

    Raises:
        InputError: if a row is no distribution or there are fewer than two dimensions.

    Reference: Houlsby, Huszár, Ghahramani, Lengyel, 2011, Bayesian active learning, eq. 2,
    https://arxiv.org/abs/1112.5745.

    Examples:
        >>> import torch
        >>> views = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
        >>> bald(views).tolist()
        [1.0, 0.0]
    """
    return _gap(probabilities, "bald")


def channel_rate(probabilities: Float[Tensor, "samples levels"]) -> Float[Tensor, ""]:
    r"""Compute the MI of an input and its noisy level when the input is one of the given samples, each as likely.

    $$I(x; \hat x) = H\left(\frac{1}{N} \sum_n p_n\right) - \frac{1}{N} \sum_n H(p_n)$$

    It is exact for the law of the samples, and an estimate that is low by about the usual plug-in bias for the law
    they were drawn from.

    Args:
        probabilities: P(level | x) of each sample, as `Quantizer.probabilities` gives it; each row sums to one.

    Returns:
        The rate in bits, in [0, min(log2 samples, log2 levels)].

    Raises:
        InputError: if a row is no distribution or there are fewer than two dimensions.

    Reference: Cover and Thomas, 2006, Elements of information theory, theorem 2.4.1.

    Examples:
        >>> import torch
        >>> channel_rate(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item()
        1.0
    """
    return _gap(probabilities, "channel_rate")


def _gap(probabilities: Float[Tensor, "sources *rest k"], name: str) -> Float[Tensor, "*rest"]:
    _check.at_least(probabilities, 2, name)
    p = _check.distribution(probabilities, -1, name)
    return xlog2x(p).sum(-1).mean(0) - xlog2x(p.mean(0)).sum(-1)
