r"""Build joint tables of predictions: soft, per class, for every pair of members, moving over batches.

A soft joint is the law of (A, B) when an example is picked at random and A and B are then drawn from the
predictive distributions $p(\cdot \mid x_n)$ and $q(\cdot \mid x_n)$. One-hot predictions give the table of
relative counts. Products are taken in float32 or wider, also under autocast.
"""

from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.information import _check
from bitquorum.interface import InputError


def pairs(members: int) -> tuple[tuple[int, int], ...]:
    """Return the pairs i < j of members, in the order in which the pairwise functions stack them.

    Raises:
        InputError: if `members` is below one.

    Examples:
        >>> pairs(3)
        ((0, 1), (0, 2), (1, 2))
    """
    if members < 1:
        raise InputError(f"pairs: expected at least one member, got {members}")
    return tuple(combinations(range(members), 2))


def soft_joint(
    p: Float[Tensor, "*tables batch a"], q: Float[Tensor, "*tables batch b"]
) -> Float[Tensor, "*tables a b"]:
    r"""Compute the joint table of two predictive distributions.

    $$P_{ab} = \frac{1}{N} \sum_n p(a \mid x_n) \, q(b \mid x_n)$$

    Args:
        p: Probabilities of one member; each row sums to one.
        q: Probabilities of the other member on the same examples; it may have another number of classes.

    Returns:
        Probabilities that sum to one over the last two dimensions.

    Raises:
        InputError: if the rows are no distributions or the batches differ.

    Reference: Ji, Henriques, Vedaldi, 2019, invariant information clustering,
    https://arxiv.org/abs/1807.06653. Deviation: the table is not symmetrised, since two members are not
    exchangeable.

    Examples:
        >>> soft_joint(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.eye(2)).tolist()
        [[0.5, 0.25], [0.0, 0.25]]
    """
    left, right = _rows(p, 2, "soft_joint"), _rows(q, 2, "soft_joint")
    _same_batch(p, q, "soft_joint")
    return _product(left, right) / p.shape[-2]


def class_joint(
    p: Float[Tensor, "batch a"], q: Float[Tensor, "batch b"], labels: Int[Tensor, "batch"], classes: int
) -> Float[Tensor, "y a b"]:
    r"""Compute the joint table of the label and two predictive distributions.

    $$P_{yab} = \frac{1}{N} \sum_{n: y_n = y} p(a \mid x_n) \, q(b \mid x_n)$$

    Args:
        p: Probabilities of one member; each row sums to one.
        q: Probabilities of the other member on the same examples.
        labels: Class of each example, in [0, `classes`).
        classes: Number of classes; one that is absent from the batch gets a table of zeros.

    Returns:
        Probabilities that sum to one over everything; for `conditional_mutual_information`.

    Raises:
        InputError: if the rows are no distributions, the batches differ or a label is out of range.

    Examples:
        >>> p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> class_joint(p, p, torch.tensor([0, 1]), 2).tolist()
        [[[0.5, 0.0], [0.0, 0.0]], [[0.125, 0.125], [0.125, 0.125]]]
    """
    left, right = _rows(p, 2, "class_joint"), _rows(q, 2, "class_joint")
    _same_batch(p, q, "class_joint")
    return _by_class(left, right, labels, classes, "class_joint")


def pairwise_joints(probabilities: Float[Tensor, "members batch c"]) -> Float[Tensor, "pairs c c"]:
    """Compute `soft_joint` for every pair of members, in the order of `pairs`.

    Raises:
        InputError: if there are fewer than two members or the rows are no distributions.

    Examples:
        >>> pairwise_joints(torch.full((3, 5, 2), 0.5)).shape
        torch.Size([3, 2, 2])
    """
    flat = _members_side_by_side(probabilities, "pairwise_joints")
    members, batch, classes = probabilities.shape
    table = (_product(flat, flat) / batch).view(members, classes, members, classes)
    return _upper(table.permute(0, 2, 1, 3))


def pairwise_class_joints(
    probabilities: Float[Tensor, "members batch c"],
    labels: Int[Tensor, "batch"],
    *,
    classes: int | None = None,
) -> Float[Tensor, "pairs y c c"]:
    """Compute `class_joint` for every pair of members, in the order of `pairs`.

    Args:
        probabilities: Probabilities of the members; each row sums to one.
        labels: Class of each example, in [0, `classes`).
        classes: Number of classes y; the members' own c when omitted.

    Raises:
        InputError: if there are fewer than two members, the rows are no distributions or a label is out of
            range.

    Examples:
        >>> pairwise_class_joints(torch.full((3, 5, 2), 0.5), torch.tensor([0, 1, 1, 0, 1])).shape
        torch.Size([3, 2, 2, 2])
    """
    flat = _members_side_by_side(probabilities, "pairwise_class_joints")
    members, _, width = probabilities.shape
    count = width if classes is None else classes
    table = _by_class(flat, flat, labels, count, "pairwise_class_joints")
    return _upper(table.view(count, members, width, members, width).permute(1, 3, 0, 2, 4))


def moving(
    previous: Float[Tensor, "*table"] | None, batch: Float[Tensor, "*table"], decay: float
) -> Float[Tensor, "*table"]:
    r"""Average a joint over batches in value, and keep the gradient of the present batch with weight one.

    $$P = \lambda P_{prev} + (1 - \lambda) P_{batch}, \qquad \partial P / \partial P_{batch} := 1$$

    The plug-in MI of one mini-batch is biased (by 0.46 bit for 128 examples of 10 classes), and so is its
    slope. The MI of the moving joint is not, or less; its gradient $\partial I / \partial P$ is taken at that
    joint and passed to the batch. The true derivative carries a factor $1 - \lambda$, since the remembered
    batches are constants: that factor would tie the strength of an objective term to the memory, so that a
    longer memory would silently switch the term off. Over the batches to come the weights of one batch sum to
    one, which is the weight given here.

    Args:
        previous: The result of the last call, or `None` at the start; it receives no gradient.
        batch: The joint of the present batch.
        decay: The memory $\lambda$, in [0, 1); about $1 / (1 - \lambda)$ batches are averaged.

    Returns:
        The moving joint; pass it, detached or not, as `previous` next time.

    Raises:
        InputError: if `decay` is out of range or the shapes differ.

    Examples:
        >>> batch = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> joint = moving(torch.tensor([1.0, 0.0]), batch, decay=0.75)
        >>> joint.sum().backward()
        >>> joint.tolist(), batch.grad.tolist()
        ([0.75, 0.25], [1.0, 1.0])
    """
    if not 0.0 <= decay < 1.0:
        raise InputError(f"moving: expected a decay in [0, 1), got {decay}")
    if previous is None:
        return batch
    if previous.shape != batch.shape:
        raise InputError(
            f"moving: expected a previous joint of shape {tuple(batch.shape)}, got {tuple(previous.shape)}; "
            "start with None when members or classes change"
        )
    here = batch.detach()
    return decay * previous.detach() + (1 - decay) * here + (batch - here)


def _rows(p: Float[Tensor, "..."], dims: int, name: str) -> Float[Tensor, "..."]:
    _check.at_least(p, dims, name)
    return _check.distribution(p, -1, name)


def _same_batch(p: Float[Tensor, "..."], q: Float[Tensor, "..."], name: str) -> None:
    if p.shape[:-1] != q.shape[:-1]:
        raise InputError(
            f"{name}: expected two members on the same examples, got shapes {tuple(p.shape)} and {tuple(q.shape)}"
        )


def _members_side_by_side(p: Float[Tensor, "members batch c"], name: str) -> Float[Tensor, "batch columns"]:
    """Return one row per example, so that a single matrix product gives the tables of all pairs."""
    if p.dim() != 3 or p.shape[0] < 2:
        raise InputError(f"{name}: expected [members >= 2, batch, classes], got shape {tuple(p.shape)}")
    return _rows(p, 3, name).transpose(0, 1).flatten(1)


def _product(p: Float[Tensor, "*tables batch a"], q: Float[Tensor, "*tables batch b"]) -> Float[Tensor, "*tables a b"]:
    with torch.autocast(device_type=p.device.type, enabled=False):
        return p.mT @ q


def _by_class(
    p: Float[Tensor, "batch a"],
    q: Float[Tensor, "batch b"],
    labels: Int[Tensor, "batch"],
    classes: int,
    name: str,
) -> Float[Tensor, "y a b"]:
    chosen = _one_hot(labels, classes, p, name)
    split = (chosen.unsqueeze(2) * p.unsqueeze(1)).flatten(1)
    return (_product(split, q) / p.shape[0]).view(classes, p.shape[1], q.shape[1])


def _one_hot(
    labels: Int[Tensor, "batch"], classes: int, like: Float[Tensor, "batch a"], name: str
) -> Float[Tensor, "batch y"]:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole or labels.shape != like.shape[:1]:
        raise InputError(
            f"{name}: expected {like.shape[0]} integer labels, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise InputError(f"{name}: expected labels in [0, {classes}), got {int(labels.min())} to {int(labels.max())}")
    return (labels.unsqueeze(1) == torch.arange(classes, device=labels.device)).to(like)


def _upper(table: Float[Tensor, "members members *rest"]) -> Float[Tensor, "pairs *rest"]:
    left, right = torch.triu_indices(table.shape[0], table.shape[0], 1, device=table.device)
    return table[left, right]
