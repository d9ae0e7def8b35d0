"""Run a suite: compute the entries that are not stored yet, and keep their rows together."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitquorum.bench.entry import entry_folder
from bitquorum.bench.pools import Outcome, Place, Task, processes, serial, title
from bitquorum.bench.suite import Entry, Suite
from bitquorum.bench.summary import summarize
from bitquorum.files import atomic_write, json_row, read_jsonl, write_jsonl
from bitquorum.interface import BitquorumError, ConfigError, DataError, InputError
from bitquorum.registry import decode, digest, encode
from bitquorum.report import bench_files
from bitquorum.store import Run

Pool = Callable[[Sequence[Task], Place], Iterator[Outcome]]


def bench(
    suite: Suite,
    place: Place,
    *,
    only: Sequence[str] = (),
    known: Sequence[Path] = (),
    jobs: int = 1,
    cluster: str | None = None,
) -> tuple[Run, list[dict[str, Any]]]:
    """Train and attack the rows of a suite; return its run and one row for each that is stored.

    Entries are cached by the hash of their config, below the folder of runs and in published suites: a second call,
    another suite that shares an entry, or a call after a kill computes only what is missing.

    Args:
        suite: What is compared.
        place: Folder of runs, device, data and listener.
        only: Titles of rows to compute, all of them by default.
        known: Folders of published suites, whose rows are taken where their entry is the same.
        jobs: Number of processes on this machine, each with its share of the cores.
        cluster: Address of a Ray cluster in place of processes; `local` starts one on this machine.

    Raises:
        BitquorumError: if an entry could not be computed, after all others are; or if a stored file is corrupt.
    """
    absent = [str(folder) for folder in known if not (folder / "entries").is_dir()]
    if absent:
        raise InputError(f"expected folders of published suites, which hold `entries`, got {', '.join(absent)}")
    pool = _pool(jobs, cluster)
    stored = Run.create(place.root, f"bench-{suite.name}", encode(suite))
    with stored.lock():
        for entry in suite.entries():
            _take(entry, stored, place.root, known)
        missing = [entry for entry in suite.entries(only) if not _known(_file(stored, entry), entry)]
        failed, started = [], time.monotonic()
        if missing:
            failed = _compute(missing, stored, place, pool)
            facts = {"jobs": jobs, "seconds": round(time.monotonic() - started, 1)}
            stored.write_environment({"work": f"bench {', '.join(only) or 'all rows'}", **facts})
        rows = summary(stored)
        write_jsonl(stored.path / "metrics.jsonl", rows)
        for name, text in bench_files(rows, suite.name).items():
            atomic_write(stored.path / name, text)
    if failed:
        task, error = failed[0]
        raise DataError(
            f"expected every entry to be computed, got {len(failed)} that failed, first {title(task)}: {error}; "
            "the same command tries these again"
        )
    return stored, rows


def stored_suite(stored: Run) -> Suite:
    """Return the suite of a run.

    Raises:
        DataError: if its config is missing, corrupt or not understood by this version.
    """
    try:
        return decode(Suite, stored.config())
    except ConfigError as error:
        raise DataError(
            f"expected a suite of this version in {stored.path}/config.toml, got: {error}; restore or remove it"
        ) from error


def summary(stored: Run) -> list[dict[str, Any]]:
    """Return one row for each defence of which an entry is stored, in the order of the suite, over its seeds."""
    suite = stored_suite(stored)
    return summarize(
        [row for entry in suite.entries() for row in read_jsonl(_file(stored, entry), ("title", "seed"))],
        suite.reference,
    )


def is_bench(stored: Run) -> bool:
    """Return whether a run is that of a suite."""
    return stored.kind == "suite"


def _pool(jobs: int, cluster: str | None) -> Pool:
    if jobs < 1:
        raise InputError(f"expected at least one job, got {jobs}")
    if cluster is not None:
        if jobs > 1:
            raise InputError(f"expected either jobs on this machine or a cluster, got {jobs} jobs and {cluster!r}")
        from bitquorum.bench.cluster import machines

        return machines(cluster)
    return processes(jobs) if jobs > 1 else serial


def _compute(missing: Sequence[Entry], stored: Run, place: Place, pool: Pool) -> list[tuple[Task, BitquorumError]]:
    """Train the sources, then do the entries, and return what failed."""
    sources = list(dict.fromkeys(source for entry in missing for source in entry.sources))
    place.listener.begin("train the attacker's networks", len(sources))
    failed = [(task, error) for task, error in pool(sources, place) if error]
    place.listener.end()
    if failed:
        return failed
    place.listener.begin("entries", len(missing))
    for task, error in pool(missing, place):
        if error:
            failed.append((task, error))
        elif isinstance(task, Entry):
            _take(task, stored, place.root, ())
    place.listener.end()
    return failed


def _file(stored: Run, entry: Entry) -> Path:
    return stored.path / "entries" / f"{entry.title}@{entry.experiment.seed}.json"


def _known(path: Path, entry: Entry) -> list[dict[str, Any]]:
    """Return the row of a file if it is that of an entry: rows of other versions of it are left out."""
    return [row for row in read_jsonl(path, ("entry",)) if row["entry"] == digest(entry)]


def _take(entry: Entry, stored: Run, root: Path, known: Sequence[Path]) -> None:
    """Copy the row of an entry into the suite's run, from its training or from a published suite.

    What lies there of an earlier version of the entry goes: no table holds both.
    """
    path = _file(stored, entry)
    if _known(path, entry):
        return
    path.unlink(missing_ok=True)
    for place in (entry_folder(entry, root) / "row.json", *(folder / "entries" / path.name for folder in known)):
        for row in _known(place, entry):
            atomic_write(path, json_row(row))
            return
