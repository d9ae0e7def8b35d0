r"""Compute the coordinates of one threat in the plane, from what the members said.

A vote is a member's most probable class under one draw; logits that give no probabilities (NaN, or an infinite largest
one) are a vote of their own, right for no image. The table of two members is that of their votes over images
and draws, those of the same draw paired. All information is in bits. Bias and interval come from leaving out one image
at a time (`information.jackknife`): draws of the same image are no further images. What a draw of the weights gives to
all images that meet it falls with the number of draws and is not in the interval.
"""

from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import interval
from bitquorum.information import (
    NSB,
    Estimate,
    conditional,
    entropy,
    independent_error_bits,
    jackknife,
    leave_one_out,
    mutual_information,
    of_left_out,
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

    Pair quantities are `None` for one member, `conditional_mi` and `excess` also for more than 20 classes. Tables by
    label are all but empty, and draws that repeat a vote do not fill them: `conditional_mi` is that of the votes of the
    first draw by `information.NSB` within each label, less biased than the jackknife there, and still upwards.

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
    choices = logits.argmax(-1).masked_fill(~logits.amax(-1).isfinite(), classes)
    votes = F.one_hot(choices, max(classes, int(choices.max()) + 1)).double()
    truth = F.one_hot(labels, classes).double()
    right = (votes[..., :classes] * truth).sum(-1).mean(0)
    row: dict[str, Any] = {"images": images, "draws": draws, "classes": classes}
    row |= {"accuracy": accuracy.value, "accuracy_low": accuracy.low, "accuracy_high": accuracy.high}
    row["member_accuracy"] = right.mean(1).tolist()
    by_label = torch.einsum("ny,mnc->nmyc", truth, votes.mean(0))
    of_members = [leave_one_out(by_label[:, member], mutual_information) for member in range(members)]
    row |= _columns("label_mi", of_left_out(torch.stack(of_members).mean(0)))
    row["label_matrix"] = [of_left_out(values).value for values in of_members]
    return row | _pair_quantities(votes, truth, right)


def _pair_quantities(votes: Tensor, truth: Tensor, right: Tensor) -> dict[str, Any]:
    """Return what needs two members; `None` throughout for one. Tables are held of one pair at a time."""
    (draws, members), classes = votes.shape[:2], truth.shape[-1]
    chosen = pairs(members)
    names = ("pair_mi", "conditional_mi", "residual", "excess")
    empty = {f"{name}{end}": None for name in names for end in ("", "_low", "_high")}
    if not chosen:
        return {**empty, "reference_mi": None, "pair_matrix": None}
    left_out: dict[str, list[Tensor]] = {"pair_mi": [], "residual": [], "excess": []}
    for i, j in chosen:
        joint = torch.einsum("dna,dnb->nab", votes[:, i], votes[:, j]) / draws
        shared = leave_one_out(joint, mutual_information)
        reference = leave_one_out(torch.stack([right[i], right[j]], -1), partial(_reference, classes=classes))
        left_out["pair_mi"].append(shared)
        left_out["residual"].append(shared - reference)
        if classes <= MOST_CLASSES:
            left_out["excess"].append(leave_one_out(torch.einsum("ny,nab->nyab", truth, joint), _excess))
    row: dict[str, Any] = dict(empty)
    for name, values in left_out.items():
        if values:
            row |= _columns(name, of_left_out(torch.stack(values).mean(0)))
    accuracies = right.mean(1)
    row["reference_mi"] = fmean(float(_reference(accuracies[[i, j]], classes)) for i, j in chosen)
    own = [jackknife(cast, entropy).value for cast in votes.mean(0)]
    matrix = torch.diag(torch.tensor(own, dtype=torch.float64))
    for (i, j), values in zip(chosen, left_out["pair_mi"], strict=True):
        matrix[i, j] = matrix[j, i] = of_left_out(values).value
    row["pair_matrix"] = matrix.tolist()
    if classes <= MOST_CLASSES:
        row |= _conditional(votes[0].argmax(-1), truth.argmax(-1), chosen)
    return row


def _conditional(
    codes: Int[Tensor, "members images"], labels: Int[Tensor, "images"], chosen: tuple[tuple[int, int], ...]
) -> dict[str, float]:
    """Return the conditional MI of the votes of one draw: tables by label are all but empty, and NSB bears that."""
    found = [conditional(NSB(), codes[i], codes[j], labels) for i, j in chosen]
    error = fmean(one.standard_error for one in found)  # as if pairs erred together
    return _columns("conditional_mi", replace(found[0], value=fmean(one.value for one in found), standard_error=error))


def _reference(accuracies: Float[Tensor, "*batch 2"], classes: int) -> Float[Tensor, "*batch"]:
    first, second = accuracies.clamp(0, 1).unbind(-1)
    return independent_error_bits(first, second, classes)


def _excess(tables: Float[Tensor, "*batch y a b"]) -> Float[Tensor, "*batch"]:
    """Return I(A; B) less the MI of the mixture over y of P(a | y) P(b | y)."""
    share = tables.sum((-2, -1))[..., None].clamp_min(torch.finfo(tables.dtype).tiny)
    apart = (tables.sum(-1) / share).mT @ tables.sum(-2)
    return mutual_information(tables.sum(-3)) - mutual_information(apart)


def _columns(name: str, found: Estimate) -> dict[str, float]:
    reach = _NORMAL * found.standard_error
    return {name: found.value, f"{name}_low": found.value - reach, f"{name}_high": found.value + reach}
