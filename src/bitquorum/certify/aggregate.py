r"""Say from the members' margins whether their joint prediction stays the true class.

A margin bound $m_j \le z_y - z_j$ holds for one member, over the ball and every draw of the scope. A prediction that
averages several draws is covered where each of them is: what follows from bounds of equal or smaller margins is the
same for any number of passes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bitquorum.ensemble import Aggregation, EmpirVote, MajorityVote, MeanLogits, MeanProbability
from bitquorum.interface import InputError

TIE = 1e-5
"""What a margin must exceed, so that no rounding of the aggregation undoes it: of probabilities, or the mean of logits
up to some tens in magnitude, where single precision still resolves it."""


def holds(
    aggregation: Aggregation,
    margins: Float[Tensor, "draw member batch classes"],
    labels: Int[Tensor, "batch"],
) -> Bool[Tensor, "batch"]:
    r"""Return whether the prediction is the true class wherever the margins are no less than these bounds.

    Sufficient conditions, for every class j but the true one y. Mean logits: the mean of $m_j$ is positive. Mean
    probability: so is the mean of the least $p_y - p_j$, see `probability_gap`. Votes: more members have only positive
    bounds, and so vote y, than have a bound $m_j \le 0$, and so might vote j. EMPIR's vote: no fewer, if the
    full-precision member, which decides ties, is among the former.

    Args:
        aggregation: One of those of `ensemble`.
        margins: Lower bounds; the true class's own is not looked at.
        labels: True classes.

    Raises:
        InputError: for another aggregation.

    Examples:
        >>> bounds = torch.tensor([[[[0.0, 2.0]], [[0.0, -1.0]], [[0.0, 0.1]]]])
        >>> [bool(holds(rule, bounds, torch.tensor([0]))) for rule in (MeanLogits(), MeanProbability(), MajorityVote())]
        [True, True, True]
    """
    others = ~torch.nn.functional.one_hot(labels, margins.shape[-1]).bool()
    if isinstance(aggregation, MeanLogits):
        return _everywhere(margins.mean((0, 1)) > TIE, others)
    if isinstance(aggregation, MeanProbability):
        return _everywhere(probability_gap(margins, others).mean((0, 1)) > TIE, others)
    if not isinstance(aggregation, MajorityVote | EmpirVote):
        raise InputError(
            f"expected an aggregation that has a certificate, got {type(aggregation).__name__}; choose mean-logits, "
            "mean-probability, majority-vote or empir-vote"
        )
    sure = _everywhere(margins > TIE, others)  # [draw, member, batch]
    mine, theirs = sure.sum((0, 1))[:, None], (~(margins > TIE)).sum((0, 1))  # a bound may be no number
    won = _everywhere(mine > theirs, others)
    if isinstance(aggregation, MajorityVote):
        return won
    return won | (_everywhere(mine >= theirs, others) & sure[:, aggregation.full_precision].all(0))


def probability_gap(
    margins: Float[Tensor, "*views batch classes"], others: Bool[Tensor, "batch classes"]
) -> Float[Tensor, "*views batch classes"]:
    r"""Return the least $p_y - p_j$ of a softmax whose $z_y - z_k$ are no less than $m_k$.

    With $t_k = e^{z_k - z_y}$ it is $(1 - t_j) / (1 + \sum_k t_k)$, which falls with $t_j$, and with every other $t_k$
    while it is positive: all at their largest $e^{-m_k}$ then. Where $m_j < 0$ the others at 0 make it least:
    $\tanh(m_j / 2)$. Exact, but for margins that no logits have at once.

    Examples:
        >>> probability_gap(torch.tensor([[0.0, -2.0, 30.0]]), torch.tensor([[False, True, True]]))
        tensor([[ 0.0000, -0.7616,  0.1192]])
    """
    largest = (-margins).masked_fill(~others, 0.0)
    true = torch.exp(-largest.logsumexp(-1, keepdim=True))  # the least probability of the true class
    gap = torch.where(margins >= 0, -torch.expm1(largest) * true, torch.tanh(margins / 2))
    return gap.masked_fill(~others, 0.0)


def _everywhere(condition: Tensor, others: Tensor) -> Tensor:
    return (condition | ~others).all(-1)
