"""Keep a run as a folder: its config, metrics, weights and environment, written so that a kill loses little.

    NAME-DIGEST/config.toml         complete and replayable; its digest names the folder
    NAME-DIGEST/environment.json    one row per session of work: versions, hardware, git revision
    NAME-DIGEST/*.jsonl             rows, appended
    NAME-DIGEST/*.safetensors       tensors, no pickle

Files are replaced as a whole or grow by whole rows; a row cut by a kill is dropped when the file is read.
"""

import fcntl
import json
import re
import secrets
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquorum.environment import environment
from bitquorum.files import atomic_write, json_row
from bitquorum.interface import DataError, InputError
from bitquorum.registry import digest, nearest, to_toml
from bitquorum.toml import read_toml

_PUBLISHED = (".toml", ".json", ".jsonl", ".md", ".csv", ".html")
_SESSION = {"versions", "cpu", "cuda", "threads"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Read and write one run: a folder whose name ends in the digest of its config.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     run = Run.create(Path(folder), "digits", {"seed": 1})
        ...     run.path.name, Run.find(Path(folder), "digits").config()
        ('digits-...', {'seed': 1})
    """

    path: Path

    @classmethod
    def create(cls, root: Path | str, name: str, config: Mapping[str, Any]) -> "Run":
        """Return the run of this name and config below `root`, made unless it is there, so that it resumes.

        Raises:
            InputError: if the name is no plain file name, or the config cannot be stored.
            DataError: if the folder is there with another config.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"expected a run name of letters, digits, '.', '_' and '-', got {name!r}; rename it")
        run = cls(path=cls.place(root, name, config))
        text = to_toml(config)
        if not (run.path / "config.toml").exists():
            atomic_write(run.path / "config.toml", text)
        elif run.config() != tomllib.loads(text):
            raise DataError(
                f"expected the config of this run in {run.path}/config.toml, got another one; "
                "remove the folder or restore the file"
            )
        return run

    @staticmethod
    def place(root: Path | str, name: str, config: Mapping[str, Any]) -> Path:
        """Return the folder of the run of a name and config, whether it is there or not."""
        return Path(root) / f"{name}-{digest(config)}"

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """Return the run stored in a folder.

        Raises:
            DataError: if the folder has no config.
        """
        if not (Path(path) / "config.toml").is_file():
            raise DataError(
                f"expected a run folder with a config.toml at {path}, got none; `bitquorum list` shows the runs"
            )
        return cls(path=Path(path))

    @classmethod
    def listing(cls, root: Path | str) -> list["Run"]:
        """Return the runs directly below `root`, sorted by name; none when there is no such folder."""
        return [cls(path=config.parent) for config in sorted(Path(root).glob("*/config.toml"))]

    @classmethod
    def find(cls, root: Path | str, query: str | Path) -> "Run":
        """Return the run that a path, a full name, or the beginning or end of a name or digest names.

        A run whose name without the digest is the whole query goes before those that begin or end with it.

        Raises:
            InputError: if several runs fit; the message lists them.
            DataError: if none fits.
        """
        text = str(query)
        if text and (Path(text) / "config.toml").is_file():
            return cls(path=Path(text))
        runs = {run.path.name: run for run in cls.listing(root)}
        if text in runs:
            return runs[text]
        fitting = [name for name in runs if name.rpartition("-")[0] == text]
        fitting = fitting or [name for name in runs if text and _fits(name, text)]
        if len(fitting) > 1:  # a command that was refused may have left a config alone
            fitting = [name for name in fitting if (runs[name].path / "environment.json").exists()] or fitting
        if len(fitting) > 1:
            raise InputError(f"expected one run, got {text!r}, which fits {', '.join(fitting)}; give more of it")
        if not fitting:
            advice = nearest(text, runs) if runs else "there are none yet"
            raise DataError(
                f"expected the path, name or digest of a run in {root}, got {text!r}; {advice} "
                "(`bitquorum list` shows the runs)"
            )
        return runs[fitting[0]]

    def config(self) -> dict[str, Any]:
        """Return the stored config.

        Raises:
            DataError: if it is missing or no TOML.
        """
        return read_toml(self.path / "config.toml")

    @property
    def kind(self) -> str:
        """The type of the stored config, such as `experiment` or `suite`; empty where it cannot be read."""
        try:
            return str(self.config().get("type", ""))
        except DataError:
            return ""

    def publish(self, target: Path | str) -> None:
        """Copy config, environment, rows and tables to a folder: no weights, no images, and no page that shows some.

        A run of this kind that was published there before is replaced, once all is copied.

        Raises:
            InputError: if the folder holds something else than such a run, or is or holds this run itself.
        """
        target = Path(target).resolve()
        if self.path.resolve().is_relative_to(target):
            raise InputError(f"expected a folder outside of the run, got {target}, which holds the run; choose another")
        if target.exists() and any(target.iterdir()):
            strange = any(p.is_file() and p.suffix not in _PUBLISHED for p in target.rglob("*"))
            if strange or not self.kind or Run(path=target).kind != self.kind:
                raise InputError(
                    f"expected a new folder or a published run of this kind at {target}, got other files; choose "
                    "another"
                )
        copy, earlier = (target.with_name(f".{target.name}.{secrets.token_hex(6)}.{end}") for end in ("part", "old"))
        try:
            for path in sorted(self.path.rglob("*")):
                page = path.suffix == ".html" and self.kind == "experiment"
                if path.is_file() and path.suffix in _PUBLISHED and not page:
                    atomic_write(copy / path.relative_to(self.path), path.read_bytes())
            if target.exists():
                target.rename(earlier)
            copy.rename(target)
        except BaseException:
            shutil.rmtree(copy, ignore_errors=True)
            if earlier.exists() and not target.exists():
                earlier.rename(target)
            raise
        shutil.rmtree(earlier, ignore_errors=True)

    def folder(self, *parts: str) -> Path:
        """Return a folder inside the run, made when it is missing.

        Raises:
            InputError: if it would lie outside of the run.
        """
        path = self.path.joinpath(*parts)
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise InputError(f"expected a folder inside {self.path}, got {path}; leave out '..' and '/'")
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_environment(self, extra: Mapping[str, Any] | None = None, *, replace: bool = False) -> None:
        """Append `environment()` and `extra` as one row to the list in `environment.json`, or replace its last row.

        Raises:
            InputError: if `extra` holds what JSON cannot.
            DataError: if the file is corrupt.
        """
        path = self.path / "environment.json"
        earlier = self.environments()
        rows = [*(earlier[:-1] if replace else earlier), json.loads(json_row({**environment(), **(extra or {})}))]
        atomic_write(path, json.dumps(rows, indent=1) + "\n")

    def environments(self) -> list[dict[str, Any]]:
        """Return the rows of `environment.json`, one per session of work, oldest first.

        Raises:
            DataError: if the file is corrupt.
        """
        path = self.path / "environment.json"
        if not path.exists():
            return []
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"expected a JSON list at {path}, got: {error}; restore or remove it") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _SESSION for row in rows):
            raise DataError(f"expected a JSON list of sessions of work at {path}, got other JSON; restore or remove it")
        return rows

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process inside the block; the kernel releases it when the process ends.

        Raises:
            InputError: if another process, or another block of this one, works in the folder.
        """
        with (self.folder() / ".lock").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    f"expected {self.path} to be free, got a run that another process works in; wait for it or end it"
                ) from error
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still hold the file open


def _fits(name: str, query: str) -> bool:
    """Return whether a folder name, its name part or its digest begins or ends with the query."""
    stem, _, digits = name.rpartition("-")
    return any(part.startswith(query) or part.endswith(query) for part in (name, stem, digits))
