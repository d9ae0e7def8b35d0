"""Climb the ladder with every arm of a stored run, and store steps, outcomes, adversarial images and verdicts."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from bitquorum.attacks.transfer import TWINS
from bitquorum.config import Arm, Experiment
from bitquorum.data import ImageSet, load
from bitquorum.ensemble import Ensemble
from bitquorum.evaluate import Accuracy, Arena, Climb, Examples, Ladder, Verdict, interval, run_checks
from bitquorum.evaluate.climbs import mark_of, read_climb, write_climb
from bitquorum.experiment.runs import choose_arms, ensembles, experiment_of, working
from bitquorum.files import append_jsonl, atomic_write, json_row, read_jsonl, write_jsonl
from bitquorum.interface import DataError, Listener
from bitquorum.peers import PeerError, check_peer, second_opinion
from bitquorum.registry import decode, digest, encode, to_toml
from bitquorum.store import Run
from bitquorum.toml import read_toml

_OPINION: Final = "second opinion"


def climb_run(
    stored: Run,
    ladder: Ladder,
    *,
    arms: Sequence[str] = (),
    also: Sequence[str] = (),
    device: str = "cpu",
    data_root: Path | None = None,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Climb the ladder with the arms of a trained run and return the rows of the result.

    Every other arm is a source of transfer attacks, as a separately trained ensemble. A killed call resumes after the
    last rung that was climbed; finished arms are not climbed again. Arms may be climbed on several machines, in copies
    of the run: once their folders lie together, the same call collects them.

    Args:
        stored: A trained run.
        ladder: What to climb, with its epsilons. It is stored as `ladder.on(device)`, by its digest.
        arms: Names of the arms to climb with; all of them by default.
        also: Names of peers whose second opinion is added; see `peers`.
        device: Where to compute.
        data_root: Folder of data sets.
        listener: Hears of progress.

    Raises:
        BitquorumError: if an arm or a peer is unknown or not trained, data are missing, or a stored file is corrupt;
            if a peer failed, after all else is done.
    """
    experiment = experiment_of(stored)
    chosen = choose_arms(experiment, arms)
    for name in also:
        check_peer(name, ladder.norm)
    ladder = ladder.on(device)
    folder = ladder_folder(stored, ladder)
    parts = [*(f"{arm.name}/verdicts.jsonl" for arm in chosen), *_opinion_files(chosen, ladder, also)]
    if all((folder / part).exists() for part in parts):
        return _keep(folder, experiment, ladder)
    listener = listener or Listener()
    with working(stored, experiment, f"ladder {ladder.name}"):
        atomic_write(folder / "ladder.toml", to_toml(encode(ladder)))
        test = ladder.choose(load(experiment.data.name, "test", root=data_root))
        trained = ensembles(stored, device=device, data_root=data_root)
        examples = examples_of(test, device)
        failed: list[PeerError] = []
        for arm in chosen:
            others = {_held(name): ensemble for name, ensemble in trained.items() if name != arm.name}
            if not (folder / arm.name / "verdicts.jsonl").exists():
                climb_arm(folder / arm.name, ladder, trained[arm.name], others, examples, listener)
            for name in also:
                try:
                    _ask(folder / arm.name, ladder, trained[arm.name], examples, name, listener)
                except PeerError as error:
                    failed.append(error)
        rows = _keep(folder, experiment, ladder)
    if failed:
        raise failed[0]
    return rows


def _held(arm: str) -> str:
    """Return the name by which rungs call an arm that the attacker holds: not that of a copy without noise."""
    return f"arm {arm}" if arm in TWINS else arm


def usual_epsilons(stored: Run) -> list[float]:
    """Return the middle one of the epsilons of a run's own evaluation: the ladder's epsilon unless one is given."""
    return list(middle(experiment_of(stored).evaluation.epsilons))


def middle(epsilons: Sequence[float]) -> Sequence[float]:
    """Return the middle one of increasing epsilons, as a list of one."""
    return epsilons[len(epsilons) // 2 :][:1]


def ladder_folder(stored: Run, ladder: Ladder) -> Path:
    """Return the folder of a ladder: each has its own, named by its digest."""
    return stored.path / "ladders" / digest(ladder)


def ladders(stored: Run) -> list[Ladder]:
    """Return the ladders that have been climbed with a run, at least with some of its arms."""
    return [
        read_ladder(path)
        for path in sorted((stored.path / "ladders").glob("*/ladder.toml"))
        if (path.parent / "metrics.jsonl").exists() or any(path.parent.glob("*/climb@*.safetensors"))
    ]


def climbed(stored: Run, ladder: Ladder) -> list[str]:
    """Return the arms that have climbed a ladder to the end; none while one is on its way."""
    folder = ladder_folder(stored, ladder)
    begun = {path.parent.name for path in folder.glob("*/climb@*.safetensors")}
    done = {path.parent.name for path in folder.glob("*/verdicts.jsonl")}
    return sorted(done) if begun <= done else []


def read_ladder(path: Path) -> Ladder:
    """Return the ladder that a file beside its results describes."""
    return decode(Ladder, read_toml(path))


def ladder_rows(stored: Run, ladder: Ladder) -> list[dict[str, Any]]:
    """Return the stored rows of a ladder; none before it was climbed to the end."""
    return read_jsonl(ladder_folder(stored, ladder) / "metrics.jsonl")


def ladder_times(stored: Run, ladder: Ladder) -> list[dict[str, Any]]:
    """Return the stored seconds of a ladder, one row for each arm and rung, or peer."""
    return [row for path in sorted(ladder_folder(stored, ladder).glob("*/seconds.jsonl")) for row in read_jsonl(path)]


def verdicts(stored: Run, ladder: Ladder) -> list[dict[str, Any]]:
    """Return the stored verdicts of the self-checks, one row for each arm, epsilon and check."""
    folder = ladder_folder(stored, ladder)
    return [row for path in sorted(folder.glob("*/verdicts.jsonl")) for row in read_jsonl(path)]


def examples_of(test: ImageSet, device: str) -> Examples:
    """Return all images of a set as the ladder takes them."""
    batch = test.batch(torch.arange(len(test)), device=device)
    return Examples(images=batch.images, labels=batch.labels, index=batch.examples)


def climb_arm(
    folder: Path,
    ladder: Ladder,
    model: Ensemble,
    others: dict[str, Ensemble],
    examples: Examples,
    listener: Listener,
) -> None:
    """Climb with one ensemble at every epsilon and store the climbs, then the verdicts, which say that all is done.

    Args:
        folder: Of the climb; its name is that of the ensemble.
        ladder: What to climb.
        model: In evaluation mode.
        others: Sources of transfer attacks by name.
        examples: Test images.
        listener: Hears of progress.
    """
    found: list[Verdict] = []
    rows: list[dict[str, Any]] = []
    mark = mark_of([model, *others.values()], examples, ladder)
    Arena(model=model, shown=model, examples=examples, ladder=ladder, sources={}).warm()
    for epsilon in ladder.epsilons:
        path = folder / f"climb@{epsilon:.6f}.safetensors"
        started = time.monotonic()
        before = _resumed(path, examples, mark) if path.exists() else None

        def keep(climb: Climb, path: Path = path) -> None:
            nonlocal started
            write_climb(path, climb, examples, mark=mark)
            now = time.monotonic()
            row = {"arm": folder.name, "epsilon": climb.epsilon, "rung": climb.steps[-1].rung}
            append_jsonl(folder / "seconds.jsonl", [{**row, "seconds": round(now - started, 1)}])
            started = now

        passes = ladder.passes(model, others)
        listener.begin(f"ladder {folder.name}", 0)
        listener.advance(0, f"batches, up to {passes.forward:,} + {passes.backward:,} passes an image")
        climb = ladder(
            model,
            examples,
            epsilon=epsilon,
            sources=others,
            climb=before,
            on_step=keep,
            listener=listener,
        )
        listener.end()
        if ladder.check_images:
            listener.begin(f"self-checks {folder.name}", 0)
            found = run_checks(model, examples, ladder, climb, sources=others, listener=listener)
            listener.end()
        common = {"arm": folder.name, "epsilon": epsilon, **norm_named(ladder)}
        rows += [{**common, **asdict(verdict)} for verdict in found]
    write_jsonl(folder / "verdicts.jsonl", rows)


def _resumed(path: Path, examples: Examples, mark: str) -> Climb:
    climb, index = read_climb(path, examples.images.device, mark=mark)
    if not torch.equal(index.cpu(), examples.index.cpu()):
        raise DataError(
            f"expected the state of a ladder on these {len(examples.index)} images at {path}, got one on others; "
            "remove it"
        )
    return climb


def _opinion_files(arms: Sequence[Arm], ladder: Ladder, names: Sequence[str]) -> list[str]:
    return [f"{arm.name}/{name}@{epsilon:.6f}.json" for arm in arms for name in names for epsilon in ladder.epsilons]


def _ask(folder: Path, ladder: Ladder, model: Ensemble, examples: Examples, name: str, listener: Listener) -> None:
    """Store a peer's second opinion: its images, judged on the same draws as ours."""
    everyone = torch.arange(len(examples.labels), device=examples.labels.device)
    for epsilon in ladder.epsilons:
        path = folder / f"{name}@{epsilon:.6f}.json"
        if path.exists():
            continue
        listener.begin(f"second opinion of {name} on {folder.name}", 0)
        opinion = second_opinion(
            name, model, examples.images, examples.labels, epsilon=epsilon, norm=ladder.norm, seed=ladder.seed
        )
        arena = Arena(model=model, shown=model, examples=examples, ladder=ladder, sources={})
        accuracy = interval(arena.judge(opinion.images, everyone))
        row = {
            **asdict(accuracy),
            "attack": f"{name} {opinion.version}",
            "epsilon": epsilon,
            "claimed": opinion.claimed,
        }
        seconds = {"seconds": round(opinion.seconds, 1)}
        facts = {"arm": folder.name, "epsilon": epsilon, "peer": f"{name} {opinion.version}", **seconds}
        append_jsonl(folder / "seconds.jsonl", [facts])
        atomic_write(path, json_row({**row, **seconds}))
        listener.end()


def _keep(folder: Path, experiment: Experiment, ladder: Ladder) -> list[dict[str, Any]]:
    """Return the rows of all finished arms, stored where they are not: an arm may have been climbed elsewhere."""
    rows = _collect(folder, experiment, ladder)
    if read_jsonl(folder / "metrics.jsonl") != rows:
        write_jsonl(folder / "metrics.jsonl", rows)
    return rows


def _collect(folder: Path, experiment: Experiment, ladder: Ladder) -> list[dict[str, Any]]:
    """Return the rows of the arms that are climbed to the end: the bracket, then each rung.

    Of an arm without its climbs, as a published run has them, the stored rows are kept.
    """
    rows: list[dict[str, Any]] = []
    stored = [row for row in read_jsonl(folder / "metrics.jsonl", ("arm", "name")) if row["name"] != _OPINION]
    for arm in experiment.arms:
        if not (folder / arm.name / "verdicts.jsonl").exists():
            continue
        climbs = sorted((folder / arm.name).glob("climb@*.safetensors"))
        for path in climbs:
            rows += climb_rows(arm, read_climb(path)[0], ladder)
        if not climbs:
            rows += [row for row in stored if row["arm"] == arm.name]
        for path in sorted((folder / arm.name).glob("*.json")):
            row = {key: value for key, value in read_jsonl(path)[0].items() if key != "seconds"}
            common = {"arm": arm.name, "members": arm.precision, "split": "test", **norm_named(ladder)}
            rows.append({**common, "name": _OPINION, **row})
    return rows


def norm_named(ladder: Ladder) -> dict[str, str]:
    """Return the norm of a ladder for its rows, which name none but those that are not the maximum norm."""
    return {} if ladder.norm == "linf" else {"norm": ladder.norm}


def climb_rows(arm: Arm, climb: Climb, ladder: Ladder) -> list[dict[str, Any]]:
    """Return what a climb shows: the bracket of clean, claim and worst case, then each rung."""
    common = {"arm": arm.name, "members": arm.precision, "split": "test", **norm_named(ladder)}

    def row(attack: str, epsilon: float, accuracy: Accuracy, **more: Any) -> dict[str, Any]:
        return {**common, "attack": attack, "epsilon": epsilon, **asdict(accuracy), **more}

    claim, tries = climb.steps[1], ladder.tries
    worst = climb.worst
    rows = [
        row("clean", 0.0, climb.clean, name="accuracy"),
        row(f"claim: {claim.rung}", climb.epsilon, climb.claimed, name="accuracy"),
        row("worst", climb.epsilon, worst, name="accuracy"),
        {**row("worst", climb.epsilon, worst, name=f"worst of {tries} tries"), "value": climb.worst_of(tries)},
    ]
    del rows[-1]["low"], rows[-1]["high"]
    for number, step in enumerate(climb.steps):
        made = int((climb.broken_by == number).sum())
        facts = {"step": number, "kind": step.kind, "attacked": step.attacked, "broke": step.broke, "worst_by": made}
        facts |= {f"alone_{key}": value for key, value in asdict(step.alone).items()} if step.alone else {}
        facts |= {"forward": step.cost.forward, "backward": step.cost.backward, "largest_perturbation": step.largest}
        rows.append(row(step.rung, climb.epsilon, step.left, name="left", **facts))
    return rows
