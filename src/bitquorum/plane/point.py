r"""Compute the coordinates of one threat in the plane, from what the members said.

A vote is a member's most probable class under one draw. The table of two members is that of their votes over images
and draws, those of the same draw paired. All information is in bits. Bias and interval come from leaving out one image
at a time (`information.jackknife`): draws of the same image are no further images. What a draw of the weights gives to
all images that meet it falls with the number of draws and is not in the interval.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import interval
from bitquorum.information import (
    NSB,
    conditional,
    conditional_mutual_information,
    entropy,
    independent_error_bits,
    jackknife,
    mutual_information,
    pairs,
)
from bitquorum.interface import InputError

MOST_CLASSES: Final = 20  # of a table of label and two votes: more would be all but empty
_NORMAL: Final = 1.959964


@torch.no_grad()
def place(
    ensemble: Ensemble, logits: Float[Tensor, "draws members images classes"], labels: Int[Tensor, "images"]
) -> dict[str, Any]:
    r"""Return accuracy and information of an ensemble's outputs, each with a 95 % interval.

    - `pair_mi`: the mean over pairs of $I(f_i; f_j)$; `label_mi`: the mean over members of $I(f_i; Y)$;
      `conditional_mi`: the mean over pairs of $I(f_i; f_j \mid Y)$.
    - `reference_mi`: what `pair_mi` would be if members of the same accuracies erred uniformly and independently;
      `residual`: `pair_mi` less that.
    - `excess`: `pair_mi` less what it would be if members with their own confusions were independent given the label:
      confusions that all members share, such as cats with dogs, are not counted as dependence.
    - `soft_mi`: the mean over pairs of the MI of the joint of their posteriors; with its bias corrected.

    Pair quantities are `None` for one member, `conditional_mi` and `excess` also for more than 20 classes. Votes cast
    once, by members without noise, leave tables by label all but empty: their `conditional_mi` is that of
    `information.NSB` within each label, which is less biased than the jackknife there, and still upwards.

    Args:
        ensemble: Says how a prediction is made, and of how many draws.
        logits: What each member said.
        labels: True classes.

    Raises:
        InputError: if the draws make no prediction, or shapes do not fit.

    Examples:
        >>> from bitquorum.ensemble import Ensemble
        >>> truth = torch.arange(100) % 2
        >>> says = 9.0 * F.one_hot(truth, 2)[None, None].expand(1, 2, -1, -1)
        >>> point = place(Ensemble([torch.nn.Linear(1, 2)] * 2), says, truth)
        >>> point["accuracy"], round(point["pair_mi"], 2), round(point["residual"], 2)
        (1.0, 1.01, 0.01)
    """
    draws, members, images, classes = logits.shape
    if labels.shape != (images,) or (draws < ensemble.passes and ensemble.stochastic):
        raise InputError(
            f"expected one label for each of {images} images and at least {ensemble.passes} draws, got labels of "
            f"shape {tuple(labels.shape)} and {draws} draws"
        )
    whole = draws - draws % ensemble.passes if draws >= ensemble.passes else draws
    accuracy = interval(ensemble.predict(logits[:whole]) == labels)
    votes = F.one_hot(logits.argmax(-1), classes).double()
    truth = F.one_hot(labels, classes).double()
    right = (votes * truth).sum(-1).mean(0)
    row: dict[str, Any] = {"images": images, "draws": draws, "classes": classes}
    row |= {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
    row["member_accuracy"] = right.mean(1).tolist()
    by_label = torch.einsum("ny,mnc->nmyc", truth, votes.mean(0))
    row |= _estimate("label_mi", by_label, lambda tables: mutual_information(tables).mean(-1))
    row["label_matrix"] = [jackknife(by_label[:, member], mutual_information).value for member in range(members)]
    return row | _pair_quantities(logits, votes, truth, right)


def _pair_quantities(logits: Tensor, votes: Tensor, truth: Tensor, right: Tensor) -> dict[str, Any]:
    """Return what needs two members; `None` throughout for one."""
    chosen = pairs(votes.shape[1])
    names = ("pair_mi", "conditional_mi", "residual", "excess")
    empty = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
    if not chosen:
        return {**empty, "reference_mi": None, "soft_mi": None, "pair_matrix": None}
    classes = votes.shape[-1]
    first, second = ([pair[side] for pair in chosen] for side in (0, 1))
    joints = _joints(votes, first, second)
    both = torch.cat([joints.flatten(2), right[first].T[..., None], right[second].T[..., None]], -1)
    row = empty | _estimate("pair_mi", joints, lambda tables: mutual_information(tables).mean(-1))
    row |= _estimate("residual", both, partial(_residual, classes=classes))
    reference = independent_error_bits(right.mean(1)[first], right.mean(1)[second], classes)
    row |= {"reference_mi": float(reference.mean()), "pair_matrix": _matrix(votes, joints, first, second)}
    soft = _joints(logits.double().softmax(-1), first, second)
    row["soft_mi"] = jackknife(soft, lambda tables: mutual_information(tables).mean(-1)).value
    if classes <= MOST_CLASSES:
        triples = torch.einsum("ny,npab->npyab", truth, joints)
        row |= _estimate("excess", triples, _excess)
        if len(votes) > 1:
            row |= _estimate("conditional_mi", triples, lambda tables: conditional_mutual_information(tables).mean(-1))
        else:
            row |= _of_single_votes(votes[0].argmax(-1), truth.argmax(-1), chosen)
    return row


def _of_single_votes(
    codes: Int[Tensor, "members images"], labels: Int[Tensor, "images"], chosen: tuple[tuple[int, int], ...]
) -> dict[str, float]:
    """Return the conditional MI of votes that were cast once: tables by label are all but empty, and NSB bears that."""
    found = [conditional(NSB(), codes[i], codes[j], labels) for i, j in chosen]
    value = sum(one.value for one in found) / len(found)
    error = sum(one.standard_error for one in found) / len(found)  # as if pairs erred together
    return _columns("conditional_mi", value, error)


def _joints(p: Float[Tensor, "draws members images c"], first: list[int], second: list[int]) -> Tensor:
    """Return the table of each image and pair, averaged over draws, [images, pairs, c, c]."""
    return torch.einsum("dpna,dpnb->npab", p[:, first], p[:, second]) / len(p)


def _residual(tables: Float[Tensor, "*batch pairs entries"], classes: int) -> Float[Tensor, "*batch"]:
    joints = tables[..., :-2].unflatten(-1, (classes, classes))
    reference = independent_error_bits(tables[..., -2].clamp(0, 1), tables[..., -1].clamp(0, 1), classes)
    return (mutual_information(joints) - reference).mean(-1)


def _excess(tables: Float[Tensor, "*batch pairs y a b"]) -> Float[Tensor, "*batch"]:
    """Return I(A; B) less the MI of the mixture over y of P(a | y) P(b | y)."""
    share = tables.sum((-2, -1))[..., None].clamp_min(torch.finfo(tables.dtype).tiny)
    apart = (tables.sum(-1) / share).mT @ tables.sum(-2)
    return (mutual_information(tables.sum(-3)) - mutual_information(apart)).mean(-1)


def _matrix(votes: Tensor, joints: Tensor, first: list[int], second: list[int]) -> list[list[float]]:
    """Return I(f_i; f_j) of every pair, and the entropy of the votes on the diagonal."""
    single = votes.mean(0)
    matrix = torch.diag(torch.tensor([jackknife(rows, entropy).value for rows in single], dtype=torch.float64))
    for number, (i, j) in enumerate(zip(first, second, strict=True)):
        matrix[i, j] = matrix[j, i] = jackknife(joints[:, number], mutual_information).value
    return matrix.tolist()


def _estimate(name: str, contributions: Tensor, functional: Callable[[Tensor], Tensor]) -> dict[str, float]:
    found = jackknife(contributions, functional)
    return _columns(name, found.value, found.standard_error)


def _columns(name: str, value: float, error: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - _NORMAL * error, f"{name}_high": value + _NORMAL * error}
