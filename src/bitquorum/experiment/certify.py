"""Certify the arms of a stored run, and store which images are certified."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from bitquorum.certify import Certificate, Certify, Statement
from bitquorum.config import Arm
from bitquorum.data import ImageSet, load
from bitquorum.experiment.ladder import ladder_rows, ladders
from bitquorum.experiment.runs import experiment_of, restored, working
from bitquorum.files import atomic_write, extended, load_tensors, read_jsonl, save_tensors, write_jsonl
from bitquorum.interface import DataError, Listener
from bitquorum.registry import decode, digest, encode, to_toml
from bitquorum.store import Run
from bitquorum.toml import read_toml


def certify_run(
    stored: Run,
    certify: Certify,
    *,
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Certify every arm of a trained run and return the rows of the result; stored rows are not computed again.

    A killed call resumes after the last statement about an arm.

    Args:
        stored: A trained run.
        certify: What to certify.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.

    Raises:
        BitquorumError: if an arm is not trained or has a module without bounds, data are missing, or a stored file is
            corrupt.
    """
    experiment = experiment_of(stored)
    folder = certificate_folder(stored, certify)
    if (folder / "metrics.jsonl").exists():
        return read_jsonl(folder / "metrics.jsonl")
    listener = listener or Listener()
    with working(stored, experiment, "certify"):
        atomic_write(folder / "certify.toml", to_toml(encode(certify)))
        test = certify.choose(load(experiment.data.name, "test", root=data_root))
        rows: list[dict[str, Any]] = []
        for arm, ensemble in restored(experiment, stored, device=device, data_root=data_root):
            listener.begin(f"certify {arm.name}", 0)
            found = certify(
                ensemble,
                test,
                done=[read_certificate(path) for path in sorted((folder / arm.name).glob("*.safetensors"))],
                on_certificate=lambda part, arm=arm: _write(folder / arm.name, part, test),
                on_batch=lambda done, total: listener.advance(done, f"of {total} batches"),
                device=device,
            )
            listener.end()
            rows += [_row(arm, part, certify) for part in found]
        write_jsonl(folder / "metrics.jsonl", rows)
    return rows


def certificate_folder(stored: Run, certify: Certify) -> Path:
    """Return the folder of a certification: each has its own, named by its digest."""
    return stored.path / "certificates" / digest(certify)


def certificates(stored: Run) -> list[tuple[Certify, list[dict[str, Any]]]]:
    """Return the certifications of a run that are complete, with their rows."""
    return [
        (decode(Certify, read_toml(path.parent / "certify.toml")), read_jsonl(path))
        for path in sorted((stored.path / "certificates").glob("*/metrics.jsonl"))
    ]


def attacked_epsilons(stored: Run) -> list[float]:
    """Return the epsilons at which a run has been or is to be attacked, by its evaluation and by stored ladders."""
    own = experiment_of(stored).evaluation.epsilons
    return sorted(
        {*own, *(epsilon for ladder in ladders(stored) if ladder.norm == "linf" for epsilon in ladder.epsilons)}
    )


def ceilings(stored: Run) -> list[dict[str, Any]]:
    """Return the stored rows of attacks, of ladders and then of evaluations; each says by `ceiling` whose it is."""
    named = [(f"ladder {ladder.name}", ladder_rows(stored, ladder)) for ladder in ladders(stored)]
    grids = sorted(stored.path.glob("evaluations/*/metrics.jsonl"))
    named += [("evaluation", read_jsonl(path)) for path in grids]
    return [extended(row, ceiling=name) for name, rows in named for row in rows]


def read_certificate(path: Path) -> Certificate:
    """Return a stored certificate.

    Raises:
        DataError: if the file is corrupt.
    """
    tensors, facts = load_tensors(path)
    try:
        return Certificate(
            statement=cast("Statement", facts["statement"]),
            epsilon=float(facts["epsilon"]),
            certified=tensors["certified"].bool(),
        )
    except (KeyError, ValueError) as error:
        raise DataError(f"expected a certificate at {path}, got: {error}; remove it") from error


def _write(folder: Path, part: Certificate, test: ImageSet) -> None:
    save_tensors(
        folder / f"{part.statement}@{part.epsilon:.6f}.safetensors",
        {"certified": part.certified.to(torch.uint8), "labels": test.labels, "examples": test.index},
        {"statement": part.statement, "epsilon": repr(part.epsilon)},
    )


def _row(arm: Arm, part: Certificate, certify: Certify) -> dict[str, Any]:
    clean = part.statement == "clean"
    facts = {"arm": arm.name, "members": arm.precision, "split": "test", "epsilon": part.epsilon}
    facts |= {"name": "accuracy" if clean else "certified", "statement": part.statement}
    return {**facts, "bound": "" if clean else certify.bound, **asdict(part.accuracy())}
