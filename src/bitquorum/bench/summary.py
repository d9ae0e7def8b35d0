"""Bring the seeds of each row together: accuracies with intervals, and differences from a reference with their sign."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from bitquorum.evaluate import interval
from bitquorum.evaluate.compare import difference, holm

_ACCURACIES: Final = ("clean", "claim", "worst")
_COSTS: Final = ("bytes", "macs", "bit_operations", "train_seconds", "milliseconds")
_KEPT: Final = ("title", "members", "adversarial", "epsilon", "ladder", "draws", "device", "threads")


def summarize(rows: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Return one row for each title, in order of appearance.

    Accuracies are means over images, draws and seeds, with 95 % intervals over images and seeds: a single seed says
    nothing of others. `difference` is that of the worst case from the reference's, on the seeds that both have, paired
    by image and seed; its p-values are adjusted for the number of rows (Holm).

    Args:
        rows: Of entries.
        reference: Title of the row that the others are compared with; empty for none.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["title"], []).append(row)
    found = [_summary(group, reference) for group in groups.values()]
    if reference in groups:
        _compare(found, groups, reference)
    return found


def _summary(group: Sequence[dict[str, Any]], reference: str) -> dict[str, Any]:
    first = group[0]
    row: dict[str, Any] = {key: first[key] for key in _KEPT}
    row["device"], row["threads"] = (_either(entry[key] for entry in group) for key in ("device", "threads"))
    row |= {"reference": reference, "seeds": [entry["seed"] for entry in group], "images": len(first["examples"])}
    for name in _ACCURACIES:
        rates = _rates(group, name)
        stated = asdict(interval(rates))
        row[name] = {key: stated[key] for key in ("value", "low", "high")} | {"by_seed": rates.mean(1).tolist()}
    row["failed_checks"] = sorted({name for entry in group for name in entry["failed_checks"]})
    row["broken_by"] = _most(group)
    row["detector"] = _detector(group)
    costs = {key: [entry[key] for entry in group] for key in _COSTS}
    return row | {key: None if None in values else fmean(values) for key, values in costs.items()}


def _either(values: Iterable[Any]) -> Any:
    """Return the value that all have, or those that some have, as text."""
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else " or ".join(map(str, found))


def _rates(group: Sequence[dict[str, Any]], name: str) -> Float[Tensor, "seeds images"]:
    return torch.tensor([entry[name] for entry in group], dtype=torch.float64)


def _most(group: Sequence[dict[str, Any]]) -> str:
    """Return the rung that broke most images, `clean` where most were wrong from the start."""
    counts: Counter[str] = Counter()
    for entry in group:
        counts.update(entry["broken_by"])
    return max(counts, key=lambda rung: counts[rung], default="")


def _detector(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    measured = [entry["detector"] for entry in group if entry["detector"].get("tpr5") is not None]
    first = group[0]["detector"]
    if not measured:
        return {"statistic": first["statistic"], "tpr5": None, "auroc": None}
    means = {key: fmean(row[key] for row in measured) for key in ("tpr5", "auroc")}
    return {"statistic": first["statistic"], **means}


def _compare(found: list[dict[str, Any]], groups: dict[str, list[dict[str, Any]]], reference: str) -> None:
    theirs = {entry["seed"]: entry for entry in groups[reference]}
    compared = []
    for row in found:
        ours = [entry for entry in groups[row["title"]] if entry["seed"] in theirs]
        if row["title"] == reference or not ours:
            continue
        pair = [_rates(side, "worst") for side in (ours, [theirs[entry["seed"]] for entry in ours])]
        row["difference"] = asdict(difference(*pair))
        compared.append(row)
    for row, adjusted in zip(compared, holm([row["difference"]["p"] for row in compared]), strict=True):
        row["difference"]["adjusted_p"] = adjusted
