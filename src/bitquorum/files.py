"""Write files that a kill cannot spoil: whole files, rows of JSON, and tensors without pickle."""

import json
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitquorum.interface import DataError, InputError

_COLUMNS = {
    "text": "arm attack axis kind layer law members name norm peer quantity reason reference role rung split statement "
    "statistic threat",
    "a number": "accuracy adjusted_p alone_value attacked backward bits broke calibration classes draws epsilon "
    "forward high images label_mi loss low lr member noise_bits p parameters points rate_bits seconds step worst_by",
    "a number or null": "accepted_right auroc conditional_mi excess false_positives fooled level p_value pair_mi "
    "pearson reference_mi rejected residual right_or_rejected soft_mi spearman threshold tpr1 tpr5 value",
    "true, false or null": "passed",
    "a list": "attacked_counts clean_counts edges fpr label_matrix tpr",
    "a list or null": "pair_matrix",
}
_WANTED = {name: wanted for wanted, names in _COLUMNS.items() for name in names.split()}
_TYPES = {
    "text": {str},
    "a number": {int, float},
    "a number or null": {int, float, NoneType},
    "true, false or null": {bool, NoneType},
    "a list": {list},
    "a list or null": {list, NoneType},
}


class Row(dict[str, Any]):
    """Hold a stored row, which says where it lies when a column is asked for that it lacks."""

    def __init__(self, columns: Mapping[str, Any], place: str) -> None:
        super().__init__(columns)
        self.place = place

    def __missing__(self, column: str) -> Any:
        raise DataError(
            f"expected the column {column!r} in {self.place}, got only {', '.join(self)}; restore the file or remove "
            "the line"
        )


def extended(row: Mapping[str, Any], **columns: Any) -> dict[str, Any]:
    """Return a row with some columns more, or others; one that was stored still knows its place.

    Examples:
        >>> extended({"a": 1}, b=2)
        {'a': 1, 'b': 2}
    """
    wider = {**row, **columns}
    return Row(wider, row.place) if isinstance(row, Row) else wider


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Replace a file as a whole: a reader, or a kill, meets the old content or the new one.

    Args:
        path: Target; missing parent folders are made.
        content: Bytes, or text to be stored as UTF-8.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     atomic_write(Path(folder) / "a" / "b.txt", "one")
        ...     (Path(folder) / "a" / "b.txt").read_text()
        'one'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            _sync(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def append_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, made when it is missing, and wait until they are on the disk.

    A cut last line, as a killed process leaves it, is removed first.

    Raises:
        InputError: if a row holds what JSON cannot, such as NaN; nothing is written then.
    """
    path = Path(path)
    text = "".join(json_row(row) for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _ends_a_row(path):
        atomic_write(path, b"".join(line + b"\n" for line in _complete_lines(path)))
    with path.open("ab") as file:
        file.write(text)
        _sync(file)


def write_jsonl(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file of JSON lines as a whole.

    Raises:
        InputError: if a row holds what JSON cannot, such as NaN; nothing is written then.
    """
    atomic_write(path, "".join(json_row(row) for row in rows))


def read_jsonl(path: Path | str, keys: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; a cut last line is dropped, a missing file has no rows.

    Args:
        path: The file.
        keys: What every row must hold.

    Raises:
        DataError: if a complete line is no JSON object with these keys, holds NaN, or text where all our files have a
            number, or the reverse; and later, if a row is asked for a column that it lacks. The message names the line.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.jsonl"
        ...     append_jsonl(path, [{"step": 1, "loss": 0.5}])
        ...     _ = path.write_text(path.read_text() + '{"step": 2, "lo')
        ...     read_jsonl(path)
        [{'step': 1, 'loss': 0.5}]
    """
    return [_parse(line, path, number, keys) for number, line in enumerate(_complete_lines(path), start=1)]


def truncate_jsonl(path: Path | str, rows: int) -> None:
    """Keep the first `rows` rows of a file of JSON lines, byte for byte and atomically.

    Raises:
        InputError: if `rows` is negative.
        DataError: if the file has fewer rows.
    """
    lines = _complete_lines(path)
    if rows < 0:
        raise InputError(f"expected a number of rows of at least 0, got {rows}; pass how many rows to keep")
    if len(lines) < rows:
        raise DataError(f"expected at least {rows} rows in {path}, got {len(lines)}; begin the run anew")
    if rows or Path(path).exists():
        atomic_write(path, b"".join(line + b"\n" for line in lines[:rows]))


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors to a safetensors file, atomically; equal input gives equal bytes.

    Tensors may be tied, strided or on any device: each name stores a contiguous copy of its own.

    Args:
        path: Target file.
        tensors: Name -> dense tensor of any shape and dtype that safetensors knows.
        metadata: Name -> text, stored in the header.

    Raises:
        InputError: if a tensor has the reserved name `__metadata__`, or is not dense.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_tensors(f"{folder}/w.safetensors", {"w": torch.eye(2).T}, {"epoch": "3"})
        ...     load_tensors(f"{folder}/w.safetensors")
        ({'w': tensor([[1., 0.], [0., 1.]])}, {'epoch': '3'})
    """
    bad = [name for name, tensor in tensors.items() if name == "__metadata__" or tensor.layout != torch.strided]
    if bad:
        raise InputError(f"expected dense tensors, none named __metadata__, got {bad}; convert or rename them")
    copies = {
        name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name in sorted(tensors)
    }
    atomic_write(path, _sort_header(save(copies, dict(metadata) if metadata else None)))


def load_tensors(
    path: Path | str, device: torch.device | str = "cpu", *, without: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name, but for some that are left on the disk, and its metadata.

    Raises:
        DataError: if the file is missing or corrupt.
    """
    if not Path(path).is_file():
        raise DataError(f"expected a safetensors file at {path}, got no file; check the path or train first")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            names = [name for name in file.keys() if name not in without]  # noqa: SIM118  # it is no mapping
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise DataError(
            f"expected a safetensors file at {path}, got a corrupt one ({error}); restore or remove it"
        ) from error


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable, where the file system allows it."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_row(row: Mapping[str, Any]) -> str:
    """Return one line of JSON.

    Raises:
        InputError: if the row holds what JSON cannot, such as NaN.
    """
    try:
        return json.dumps(dict(row), allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(
            f"expected rows of strings, finite numbers, booleans, None, lists and tables, got: {error}; "
            "convert the value"
        ) from error


def _ends_a_row(path: Path) -> bool:
    """Return whether a file is missing, empty or ends in a line feed."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    return True


def _complete_lines(path: Path | str) -> list[bytes]:
    """Return the lines of a file without their ends; a last one that was cut counts if it is a whole row."""
    try:
        *lines, rest = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    with suppress(ValueError):
        return [*lines, rest] if isinstance(json.loads(rest), dict) else lines
    return lines


def _parse(line: bytes, path: Path | str, number: int, keys: Collection[str]) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not row.keys() >= set(keys):
        wanted = f" with {', '.join(keys)}" if keys else ""
        raise DataError(
            f"expected a JSON object{wanted} in line {number} of {path}, got {line[:60]!r}; restore the file or remove "
            "the line"
        )
    for column, value in row.items():
        _check_column(column, value, path, number)
    return Row(row, f"line {number} of {path}")


def _check_column(column: str, value: Any, path: Path | str, number: int) -> None:
    """Refuse a value of another type than every file of ours has in a column of this name."""
    named = column.removesuffix("_low").removesuffix("_high")
    wanted = _WANTED.get(named, "")
    if wanted and type(value) not in _TYPES[wanted]:
        raise DataError(
            f"expected {wanted} as {column!r} in line {number} of {path}, got {value!r}; restore the file or remove "
            "the line"
        )


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _sort_header(content: bytes) -> bytes:
    """Return a safetensors file with its metadata in order, which the library leaves to a random hash."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    if "__metadata__" not in header:
        return content
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[start:]
