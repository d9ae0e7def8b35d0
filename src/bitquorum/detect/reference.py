"""Pair the views of an ensemble, and remember how their votes go together on clean images."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class CleanReference:
    r"""Hold the joint tables of the hard votes of every pair of members on clean images.

    $$P_{ij}(a, b) = \frac{\sum_n w_n(a, b) + s / C^2}{N + s}$$

    where $w_n$ is the share of the draws in which members i and j vote (a, b) on image n. The additive smoothing s
    counts pseudo-images in all, spread evenly over the $C^2$ cells, so that no pair of votes has probability zero. An
    ensemble of one member has one table: that of two of its draws, symmetric, since draws can be exchanged. One member
    under one draw has none.

    Attributes:
        joints: Probabilities that sum to one over the last two dimensions; pairs in the order of `information.pairs`.
    """

    joints: Float[Tensor, "pairs classes classes"]

    @classmethod
    def fit(cls, logits: Float[Tensor, "draw member images classes"], *, smoothing: float = 1.0) -> "CleanReference":
        """Count the votes on clean images.

        Args:
            logits: Of clean images that the ensemble was not trained on.
            smoothing: Pseudo-images s, positive.

        Raises:
            InputError: if there is no image, or `smoothing` is not positive.

        Examples:
            >>> two_agree = torch.eye(2).expand(1, 2, 2, 2)
            >>> CleanReference.fit(two_agree, smoothing=2.0).joints.tolist()
            [[[0.375, 0.125], [0.125, 0.375]]]
        """
        draws, members, images, classes = logits.shape
        if not images or not smoothing > 0:
            raise InputError(f"expected clean images and a positive smoothing, got {images} images and {smoothing}")
        if draws * members == 1:
            return cls(joints=logits.new_zeros(0, classes, classes))
        first, second = paired(one_hot_votes(logits))
        counts = torch.einsum("plna,plnb->pab", first, second) / first.shape[1]
        if members == 1:
            counts = (counts + counts.mT) / 2
        return cls(joints=(counts + smoothing / classes**2) / (images + smoothing))

    def pointwise(self) -> Float[Tensor, "pairs classes classes"]:
        """Return the pointwise MI of every pair of votes, log2 of P(a, b) / (P(a) P(b)), in bits."""
        rows, columns = self.joints.sum(-1, keepdim=True), self.joints.sum(-2, keepdim=True)
        return self.joints.log2() - rows.log2() - columns.log2()


def one_hot_votes(logits: Float[Tensor, "draw member batch classes"]) -> Float[Tensor, "draw member batch classes"]:
    """Return one at the preferred class of each view, zero elsewhere; the first of equals is preferred."""
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


def paired(
    views: Float[Tensor, "draw member batch classes"],
) -> tuple[Float[Tensor, "pair look batch classes"], Float[Tensor, "pair look batch classes"]]:
    """Return the two sides of every pair of members, look by look: a look is a draw.

    With one member its draws are the views: one pair, which every two draws look at.

    Raises:
        InputError: if there is a single view, one member under one draw.

    Examples:
        >>> [tuple(side.shape) for side in paired(torch.zeros(5, 3, 7, 2))]
        [(3, 5, 7, 2), (3, 5, 7, 2)]
        >>> paired(torch.zeros(5, 1, 7, 2))[0].shape
        torch.Size([1, 10, 7, 2])
    """
    draws, members = views.shape[:2]
    if draws * members == 1:
        raise InputError("expected votes of two members or two draws to pair, got one member under one draw")
    looks = views.transpose(0, 1) if members > 1 else views  # what is paired comes first
    left, right = torch.triu_indices(len(looks), len(looks), 1, device=views.device)
    if members > 1:
        return looks[left], looks[right]
    return looks[left, 0][None], looks[right, 0][None]
