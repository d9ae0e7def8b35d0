"""Write plain tables as TOML text, change them by dotted assignments, and word what is wrong with them."""

import copy
import datetime
import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bitquorum.interface import ConfigError, DataError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_WIDTH = 100


def to_toml(table: Mapping[str, Any]) -> str:
    """Return a table as TOML text; `tomllib.loads` gives an equal table.

    Scalars and lists come first, then nested tables as `[a.b]`, then lists of tables as `[[a.b]]`.

    Raises:
        ConfigError: if a key is no string, or a value is `None` or of another type that TOML lacks.

    Examples:
        >>> print(to_toml({"seed": 1, "law": {"type": "logistic"}, "arms": [{"bits": 2}]}), end="")
        seed = 1
        <BLANKLINE>
        [law]
        type = "logistic"
        <BLANKLINE>
        [[arms]]
        bits = 2
    """
    lines = _lines(table, "")
    return "\n".join(lines[1:] if lines[:1] == [""] else lines) + "\n" if lines else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file that a run holds.

    Raises:
        DataError: if it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise DataError(f"expected a TOML file at {path}, got: {error}; restore or remove it") from error


def apply_overrides(table: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a table with dotted assignments applied in order, such as `arms.0.bits=4`.

    The value is read as TOML, and taken as a string where it is no TOML or a date. Numbers index into lists.
    Keys may be new, and make tables; numbers of a list must exist.

    Raises:
        ConfigError: if an assignment lacks its `=`, or its path leads nowhere.

    Examples:
        >>> apply_overrides({"arms": [{"name": "a"}], "seed": 0}, ["arms.0.name=b", "seed=7"])
        {'arms': [{'name': 'b'}], 'seed': 7}
    """
    changed = copy.deepcopy(dict(table))
    for override in overrides:
        key, equals, text = override.partition("=")
        path = _split(key) if equals else []
        if not path:
            raise ConfigError(
                f"expected an assignment, got {override!r}; write a key and a value like trainer.epochs=3"
            )
        place: Any = changed
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            index = _locate(place, part, ".".join(path[:depth]))
            if last:
                place[index] = _value(text.strip())
            else:
                place = place.setdefault(index, {}) if isinstance(place, dict) else place[index]
    return changed


def nearest(name: Any, options: Collection[str]) -> str:
    """Return "did you mean ...?" for the option nearest to `name`, or advice to choose one.

    Examples:
        >>> nearest("epoch", ["batch", "epochs"])
        "did you mean 'epochs'?"
    """
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else "choose one of these"


def join(path: str, key: Any) -> str:
    """Return a dotted path, longer by one key."""
    return f"{path}.{key}" if path else str(key)


def refusal(path: str, expected: str, got: Any, advice: str) -> ConfigError:
    """Return an error that says where, what was expected, what came and what to do."""
    shown = repr(got) if len(repr(got)) <= _WIDTH else f"{repr(got)[:_WIDTH]}..."
    prefix = f"{path}: " if path else ""
    return ConfigError(f"{prefix}expected {expected}, got {shown} ({type(got).__name__}); {advice}")


def _split(key: str) -> list[str]:
    """Return the parts of a dotted key, quoted parts included, or nothing where it is none."""
    try:
        place: Any = tomllib.loads(f"{key.strip()} = 0")
    except ValueError:
        return []
    parts: list[str] = []
    while isinstance(place, dict) and place:
        part, place = next(iter(place.items()))
        parts.append(part)
    return parts


def _value(text: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = table["value"]
    return text if len(table) > 1 or isinstance(value, datetime.date | datetime.time) else value


def _locate(place: Any, part: str, path: str) -> Any:
    """Return `part` as a key of a table or an index of a list."""
    if isinstance(place, list):
        if part.isdecimal() and int(part) < len(place):
            return int(part)
        raise ConfigError(f"{path}: expected an index below {len(place)}, got {part!r}; choose an item it has")
    if not isinstance(place, dict):
        raise refusal(path, "a table or a list", place, f"it has no {part!r}: shorten the path")
    return part


def _lines(table: Mapping[Any, Any], path: str) -> list[str]:
    """Return the lines of a table below its header; nested tables, then lists of tables, come last."""
    lines = [_assignment(key, item, path) for key, item in table.items() if not _is_section(item)]
    sections = [(join(path, _key(key, path)), item) for key, item in table.items() if _is_section(item)]
    for name, item in sections:
        if isinstance(item, Mapping):
            has_header = not item or not all(map(_is_section, item.values()))
            lines += ["", f"[{name}]"] if has_header else []
            lines += _lines(item, name)
    for name, item in sections:
        if not isinstance(item, Mapping):
            for element in item:
                lines += ["", f"[[{name}]]", *_lines(element, name)]
    return lines


def _is_section(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping)


def _assignment(key: Any, value: Any, path: str) -> str:
    name = _key(key, path)
    line = f"{name} = {_inline(value, join(path, name))}"
    if len(line) <= _WIDTH or not isinstance(value, list | tuple):
        return line
    return "\n".join([f"{name} = [", *(f"    {_inline(item, path)}," for item in value), "]"])


def _inline(value: Any, path: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(int(value) if isinstance(value, int) else float(value))
    if isinstance(value, str):
        return _quote(value, path)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(item, path) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k, path)} = {_inline(item, path)}" for k, item in value.items()) + "}"
    raise refusal(path, "a string, number, boolean, list or table", value, "leave it out or convert it")


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise refusal(path, "a string as a key", key, "convert it")
    return key if _BARE_KEY.fullmatch(key) else _quote(key, path)


def _quote(text: str, path: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise refusal(path, "text that UTF-8 can hold", text, "remove the lone surrogate")
    escaped = (_ESCAPES.get(c) or (f"\\u{ord(c):04X}" if c < " " or c == "\x7f" else c) for c in text)
    return f'"{"".join(escaped)}"'
