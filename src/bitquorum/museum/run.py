"""Climb the ladder with every exhibit of the museum and with its twin, and ask the peers about the same images."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from bitquorum.data import Batch, load
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Arena, Examples, Ladder, interval, ladder_named
from bitquorum.evaluate.anymodel import Report, evaluate_model
from bitquorum.files import read_jsonl, write_jsonl
from bitquorum.foreign import Wrapped, wrap
from bitquorum.interface import ConfigError, Listener, Method
from bitquorum.museum.exhibits import EPSILON, NAMES, Exhibit, exhibits
from bitquorum.peers import PeerError, check_peer, second_opinion, version_of
from bitquorum.registry import digest, encode, nearest
from bitquorum.store import Run

_BATCH: Final = 250  # images at once: AutoAttack's own number


@final
@dataclass(frozen=True, kw_only=True)
class Museum(Method):
    """Describe a visit: which exhibits, how many images, which ladder, which peers.

    Attributes:
        exhibits: Names; all of them by default.
        images: Number of test images, balanced over classes.
        ladder: Name of the ladder.
        also: Names of installed peers whose second opinion is added.
        epsilon: Radius in the maximum norm.
        seed: Of the choice of images, of attacks and of draws.
    """

    exhibits: tuple[str, ...] = NAMES
    images: int = 200
    ladder: str = "standard"
    also: tuple[str, ...] = ()
    epsilon: float = EPSILON
    seed: int = 0

    def __post_init__(self) -> None:
        ladder_named(self.ladder)
        for name in self.exhibits:
            if name not in NAMES:
                raise ConfigError(f"expected an exhibit among {', '.join(NAMES)}, got {name!r}; {nearest(name, NAMES)}")


def visit(
    museum: Museum, root: Path, *, data_root: Path | None = None, listener: Listener | None = None
) -> tuple[Run, list[dict[str, Any]]]:
    """Evaluate every exhibit and return the run and its rows; exhibits that are done are not repeated.

    Raises:
        BitquorumError: if a peer is not installed or the run is locked.
    """
    for name in museum.also:
        check_peer(name)
    stored = Run.create(root, "museum", encode(museum))
    listener = listener or Listener()
    missing = [name for name in museum.exhibits if not _is_done(museum, stored, name)]
    if missing or not museum_rows(stored):
        with stored.lock():
            started = time.monotonic()
            batch = _images(museum, data_root)
            for exhibit in exhibits(missing):
                listener.begin(f"exhibit {exhibit.name}", 0)
                rows = _rows(museum, exhibit, batch, listener)
                write_jsonl(_file(stored, exhibit.name), rows)
                listener.end()
            stored.write_environment({"work": "museum", "seconds": round(time.monotonic() - started, 1)})
            found = [row for name in museum.exhibits for row in read_jsonl(_file(stored, name))]
            write_jsonl(stored.path / "metrics.jsonl", found)
    return stored, museum_rows(stored)


def museum_rows(stored: Run) -> list[dict[str, Any]]:
    """Return the stored rows of a visit; none before its end."""
    return read_jsonl(stored.path / "metrics.jsonl")


def is_museum(stored: Run) -> bool:
    """Return whether a run is a visit to the museum."""
    return stored.kind == "museum"


def _file(stored: Run, name: str) -> Path:
    return stored.path / "exhibits" / f"{name}.jsonl"


def _is_done(museum: Museum, stored: Run, name: str) -> bool:
    """Return whether an exhibit is stored, and its ladder is the present one of that name."""
    rows, now = read_jsonl(_file(stored, name)), digest(_ladder(museum))
    return bool(rows) and all(row.get("rungs", now) == now for row in rows)


def _images(museum: Museum, data_root: Path | None) -> Batch:
    test = load("digits", "test", root=data_root).take(museum.images, seed=museum.seed)
    return test.batch(torch.arange(len(test)))


def _rows(museum: Museum, exhibit: Exhibit, batch: Batch, listener: Listener) -> list[dict[str, Any]]:
    common = {"exhibit": exhibit.name, "epsilon": museum.epsilon, "rungs": digest(_ladder(museum))}
    rows = []
    for who, model in (("twin", exhibit.twin), ("defended", exhibit.defended)):
        listener.advance(len(rows), f"ladder, {who}")
        started = time.monotonic()
        report = evaluate_model(
            model,
            batch.images,
            batch.labels,
            epsilon=museum.epsilon,
            ladder=_ladder(museum),
            seed=museum.seed,
        )
        seconds = {"seconds": round(report.seconds, 1), "seconds_with_checks": round(time.monotonic() - started, 1)}
        unseen = _unseen(museum, model, batch, report)
        rows.append({**common, "who": who, "by": f"ladder {museum.ladder}", **_of(report), **unseen, **seconds})
    for name in museum.also:
        listener.advance(len(rows), name)
        rows.append({**common, "who": "defended", "by": name, **_opinion(museum, exhibit, batch, name)})
    return rows


def _ladder(museum: Museum) -> Ladder:
    return replace(ladder_named(museum.ladder), seed=museum.seed, batch_size=_BATCH)


def _arena(ladder: Ladder, model: Wrapped | Ensemble, batch: Batch) -> Arena:
    examples = Examples(images=batch.images, labels=batch.labels, index=torch.arange(len(batch)))
    return Arena(model=model, shown=model, examples=examples, ladder=ladder, sources={})


def _unseen(museum: Museum, model: torch.nn.Module, batch: Batch, report: Report) -> dict[str, float]:
    """Return the accuracy of the worst versions on 50 draws that nothing in the evaluation saw."""
    wrapped = wrap(model, batch.images, batch.labels)
    arena = _arena(replace(_ladder(museum), seed=museum.seed + 1, draws=50), wrapped, batch)
    return {"unseen": float(arena.judge(report.climb.images, torch.arange(len(batch))).float().mean())}


def _of(report: Report) -> dict[str, Any]:
    climb = report.climb
    broke = sorted((step for step in climb.steps[1:] if step.broke), key=lambda step: -step.broke)
    return {
        **asdict(climb.worst),
        "clean": climb.clean.value,
        "claim": climb.claimed.value,
        "worst_of": climb.worst_of(report.tries),
        "broken_by": [f"{step.rung}: {step.broke}" for step in broke],
        "failed_checks": [verdict.name for verdict in report.verdicts if verdict.passed is False],
        "findings": [finding.name for finding in report.findings],
    }


def _opinion(museum: Museum, exhibit: Exhibit, batch: Batch, name: str) -> dict[str, Any]:
    """Return a peer's own number, and what its images leave on the ladder's judging draws."""
    model = wrap(exhibit.defended, batch.images, batch.labels)
    try:
        opinion = second_opinion(name, model, batch.images, batch.labels, epsilon=museum.epsilon, seed=museum.seed)
    except PeerError as error:
        return {"value": None, "claimed": None, "version": version_of(name), "failed": str(error)}
    accuracy = interval(_arena(_ladder(museum), model, batch).judge(opinion.images, torch.arange(len(batch))))
    facts = {"claimed": opinion.claimed, "version": opinion.version, "seconds": round(opinion.seconds, 1)}
    return {**asdict(accuracy), **facts}
