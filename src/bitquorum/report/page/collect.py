"""Read everything that the store holds of a run, for the page; nothing here computes a result."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitquorum.files import extended, read_jsonl
from bitquorum.interface import InputError
from bitquorum.registry import digest
from bitquorum.store import Run
from bitquorum.toml import read_toml

Row = Mapping[str, Any]

_SHEETS = ("correlations", "layers", "curves", "differences")
_FOLDERS = {
    "evaluation": "evaluations",
    "ladder": "ladders",
    "plane": "planes",
    "detection": "detections",
    "certify": "certificates",
}
_ARM_SHEETS = ("verdicts", "seconds")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Hold one stored evaluation, ladder, certification, plane or detection.

    Attributes:
        folder: Where it lies.
        config: Its method as a table.
        rows: Of `metrics.jsonl`.
        sheets: Rows of its other files by name, those of an arm's file with the column `arm`.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    sheets: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The digest that names it."""
        return self.folder.name

    @property
    def label(self) -> str:
        """Its name, where it has one, and its digest."""
        return " ".join(str(part) for part in (self.config.get("name"), self.digest) if part)

    def sheet(self, name: str) -> tuple[Row, ...]:
        """Return the rows of another file; none where it is missing."""
        return self.sheets.get(name, ())

    def arms(self) -> list[str]:
        """Return the arms that have rows, in order."""
        return distinct(self.rows, "arm")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """Hold what the store holds of a run.

    Attributes:
        name: The folder's name, with the parent's where two runs share it.
        command: What the command line calls the run.
        config: The experiment as a table.
        arms: Names, in the order of the config.
        train: Training rows of each arm that has some.
        evaluations: The run's own, then others in the order of their digests; sheet `differences`.
        ladders: Bracket and rungs; sheets `verdicts`, `seconds` and `differences`. Those in the maximum norm come
            first, of them those with most arms, then with most images.
        planes: Rows of the plane, in the order of their digests, as the next two; sheets `correlations` and `layers`.
        detections: Rows of the detector; sheet `curves`.
        certificates: Floors, statement by statement.
        environments: One row for each session of work.
        published: Whether tensors were left out.
    """

    name: str
    command: str
    config: Mapping[str, Any]
    arms: tuple[str, ...]
    train: Mapping[str, tuple[Row, ...]]
    evaluations: tuple[Part, ...]
    ladders: tuple[Part, ...]
    planes: tuple[Part, ...]
    detections: tuple[Part, ...]
    certificates: tuple[Part, ...]
    environments: tuple[Row, ...]
    published: bool

    def rows(self) -> list[Row]:
        """Return the rows of all parts."""
        parts = (*self.evaluations, *self.ladders, *self.certificates, *self.planes, *self.detections)
        return [row for part in parts for row in part.rows]

    def members(self, arm: str) -> str:
        """Return the precisions of an arm's members, as a row states them; empty where none does."""
        return next((str(row["members"]) for row in self.rows() if row.get("arm") == arm and row.get("members")), "")


def collect(runs: Sequence[Run]) -> list[RunView]:
    """Return a view of each run.

    Raises:
        InputError: if there is no run, one is given twice, or one is no experiment's.
        DataError: if a stored file is corrupt.
    """
    if not runs:
        raise InputError("expected at least one run, got none; `bitquorum list` shows the runs")
    places = [run.path.resolve() for run in runs]
    if len(set(places)) != len(places):
        raise InputError("expected different runs, got one of them twice; leave it out")
    names = [place.name for place in places]
    longer = [place.name if names.count(place.name) == 1 else "/".join(place.parts[-2:]) for place in places]
    if len(set(longer)) != len(longer):
        longer = [f"{name} ({number})" for number, name in enumerate(longer, start=1)]
    return [_view(run, name) for run, name in zip(runs, longer, strict=True)]


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """Return the different values of a column in the order in which they come; nulls are left out.

    Examples:
        >>> distinct([{"a": 2}, {"a": 1}, {"a": 2}, {}], "a")
        [2, 1]
    """
    return list(dict.fromkeys(row[column] for row in rows if row.get(column) is not None))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that hold all the wanted values.

    Examples:
        >>> select([{"a": 1, "b": 1}, {"a": 1, "b": 2}], a=1, b=2)
        [{'a': 1, 'b': 2}]
    """
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def _view(run: Run, name: str) -> RunView:
    config = run.config()
    if config.get("type") in ("suite", "museum"):
        raise InputError(
            f"expected runs of experiments for the page, got a {config['type']} at {run.path}; `bitquorum show` prints "
            "its table"
        )
    tables = config.get("arms", [])
    known = [str(arm["name"]) for arm in tables if isinstance(arm, dict) and "name" in arm]
    train = {path.parent.name: tuple(read_jsonl(path)) for path in sorted(run.path.glob("arms/*/train.jsonl"))}
    parts = {kind: _parts(run.path / folder, kind) for kind, folder in _FOLDERS.items()}
    found = [row.get("arm") for group in parts.values() for part in group for row in part.rows]
    arms = dict.fromkeys([*known, *train, *(str(arm) for arm in found if arm)])
    own = digest(config.get("evaluation", {}))
    return RunView(
        name=name,
        command=run.path.resolve().name,
        config=config,
        arms=tuple(arms),
        train={arm: train[arm] for arm in arms if train.get(arm)},
        evaluations=tuple(sorted(parts["evaluation"], key=lambda part: part.digest != own)),
        ladders=tuple(sorted(parts["ladder"], key=_rank)),
        planes=parts["plane"],
        detections=parts["detection"],
        certificates=parts["certify"],
        environments=tuple(row for row in run.environments() if isinstance(row, dict)),
        published=bool(found or train) and next(run.path.rglob("*.safetensors"), None) is None,
    )


def _rank(part: Part) -> tuple[bool, int, int]:
    """Return the key by which a ladder comes before others."""
    images = max(distinct(part.rows, "images"), default=0)
    return part.config.get("norm", "linf") != "linf", -len(part.arms()), -images


def _parts(folder: Path, kind: str) -> tuple[Part, ...]:
    """Return the finished parts of a kind, by digest: times of files are lost in a clone."""
    configs = sorted(folder.glob(f"*/{kind}.toml"))
    parts = [_part(path) for path in configs]
    return tuple(part for part in parts if part.rows)


def _part(path: Path) -> Part:
    config = read_toml(path)
    folder = path.parent
    sheets = {name: tuple(read_jsonl(folder / f"{name}.jsonl")) for name in _SHEETS}
    for name in _ARM_SHEETS:
        files = sorted(folder.glob(f"*/{name}.jsonl"))
        sheets[name] = tuple(extended(row, arm=file.parent.name) for file in files for row in read_jsonl(file))
    rows = tuple(read_jsonl(folder / "metrics.jsonl", ("arm",)))
    order = {arm: number for number, arm in enumerate(distinct(rows, "arm"))}
    for name in _ARM_SHEETS:
        sheets[name] = tuple(sorted(sheets[name], key=lambda row: order.get(row["arm"], len(order))))
    return Part(folder=folder, config=config, rows=rows, sheets={name: rows for name, rows in sheets.items() if rows})
