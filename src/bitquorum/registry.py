"""Turn methods into plain tables and back, and plain tables into TOML.

A method is its own configuration, so the annotations of its fields are the only schema. `encode` writes every
field, also those at their default: a stored table replays the run after a default has changed.

Annotations understood: `bool`, `int`, `float`, `str`, `Path`, `Literal`, `tuple[X, ...]`, `tuple[X, Y]`,
`dict[str, X]`, methods, families of methods, and unions of these with each other and with `None`.

A number may be written as a fraction in quotes, `"5/255"`.

TOML has no null. A field that is `None`, and is so by default, is left out. Elsewhere `None` is the string
"none"; where that string is itself a value of the field (a `str`, a `Path`, a `Literal` that holds it),
`None` is the table `{type = "none"}` and "none" stays a string.
"""

import hashlib
import inspect
import json
import math
import re
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from fractions import Fraction
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from bitquorum.interface import ConfigError, Method
from bitquorum.toml import apply_overrides, join, nearest, refusal, to_toml

__all__ = ["apply_overrides", "decode", "digest", "encode", "nearest", "registered", "to_toml", "type_name"]

M = TypeVar("M", bound=Method)

_WORD = re.compile(r"[A-Z]{2,}conv(?![a-z])\d*|[A-Z]+(?![a-z])\d*|[A-Z][a-z]*(?:Net(?![a-z]))?\d*|[a-z]+\d*|\d+")

_FRACTION = re.compile(r"\d+/0*[1-9]\d*")

_SCALARS: Mapping[Any, tuple[str, str]] = {
    bool: ("true or false", "write true or false, without quotes"),
    int: ("an integer", "write a whole number, without a point or quotes"),
    float: ("a finite number", 'write a finite number without quotes, or a fraction such as "8/255" in them'),
    str: ("a string", "put the value in quotes"),
    Path: ("a path", "put the path in quotes"),
}


def type_name(cls: type) -> str:
    """Return the name of a class in a table: its words in lower case, joined by hyphens.

    A word is a capital with the small letters behind it, or a run of capitals up to the one that begins the
    next word; digits belong to the word before them. As in the literature, the ending `Net` of a capitalized
    word and the ending `conv` of a run of capitals begin no word of their own.

    Examples:
        >>> [type_name(type(name, (), {})) for name in ("StochasticRounding", "PGD", "APGDTargeted")]
        ['stochastic-rounding', 'pgd', 'apgd-targeted']
        >>> [type_name(type(name, (), {})) for name in ("ResNet18", "WideResNet", "CIFARconv")]
        ['resnet18', 'wide-resnet', 'cifarconv']
    """
    return "-".join(_WORD.findall(cls.__name__)).lower()


def registered(family: type[M]) -> dict[str, type[M]]:
    """Return the concrete methods of a family, itself included, by name in alphabetical order.

    Only imported classes are found.

    Raises:
        ConfigError: if two of them share a name.

    Examples:
        >>> from bitquorum.quantizers import Law
        >>> list(registered(Law))
        ['deterministic', 'gaussian', 'logistic', 'smooth-rounding', 'stochastic-rounding']
    """
    concrete = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in _walk(family) if not _is_abstract(cls)}
    found: dict[str, type[M]] = {}
    for place, cls in concrete.items():
        other = found.setdefault(type_name(cls), cls)
        if other is not cls:
            raise ConfigError(
                f"expected one method {type_name(cls)!r} in {family.__name__}, got {place} and "
                f"{other.__module__}.{other.__qualname__}; rename one of them"
            )
    return dict(sorted(found.items()))


def encode(method: Method) -> dict[str, Any]:
    """Return a method as a table that TOML can hold: "type" first, then every field in order.

    Nested methods become tables, tuples lists, paths strings; a float field that holds an integer becomes a
    float. `decode(type(method), encode(method)) == method`.

    Raises:
        ConfigError: if a field holds what its annotation forbids, or a number that is not finite.

    Examples:
        >>> from bitquorum.quantizers import Logistic
        >>> encode(Logistic(scale=0.5))
        {'type': 'logistic', 'scale': 0.5, 'floor': 0.2, 'learned': False}
    """
    return _encode_method(method, Method, "")


def decode(family: type[M], table: Mapping[str, Any]) -> M:
    """Return the method that a table describes; the inverse of `encode`.

    Args:
        family: A concrete method, whose "type" may be left out, or an abstract one, whose "type" names one of
            `registered(family)`.
        table: Keys are fields; a field with a default may be left out.

    Raises:
        ConfigError: if a key, a type or a value does not fit; the message begins with the dotted path.

    Examples:
        >>> from bitquorum.quantizers import Law
        >>> decode(Law, {"type": "logistic", "scale": 0.3})
        Logistic(scale=0.3, floor=0.2, learned=False)
        >>> decode(Law, {"type": "logistic", "scales": 0.3})
        Traceback (most recent call last):
        bitquorum.interface.ConfigError: scales: expected a key among floor, learned, scale, type,
        got 'scales'; did you mean 'scale'?
    """
    return _decode_method(table, family, "")


def digest(method: Method | Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that name a method or its table, whatever the order of the keys.

    They begin the SHA-256 of the table as JSON with sorted keys and no spaces.

    Raises:
        ConfigError: if the table holds what JSON cannot.

    Examples:
        >>> digest({"a": 1, "b": 2.0}) == digest({"b": 2.0, "a": 1}) != digest({"a": 1, "b": 2})
        True
    """
    table = encode(method) if isinstance(method, Method) else dict(method)
    try:
        text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise ConfigError(f"expected strings, numbers, booleans, lists and tables; got: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _walk(cls: type[M]) -> Iterable[type[M]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _walk(child)


def _is_abstract(cls: type) -> bool:
    return cls is Method or ABC in cls.__bases__ or inspect.isabstract(cls)


def _is_method(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Method)


def _fields(cls: type[Method]) -> dict[str, tuple[Field[Any], Any]]:
    """Return the fields that the constructor takes, each with its resolved annotation."""
    hints = get_type_hints(cls)
    found = {field.name: (field, hints[field.name]) for field in fields(cls) if field.init}
    if "type" in found:
        raise ConfigError(f"expected no field named type in {cls.__qualname__}, got one; rename it")
    return found


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint][0]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple and arguments[-1:] == (...,):
        return f"a list of items, each {_describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} items ({'; '.join(map(_describe, arguments))})"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, arguments))
    if _is_method(hint):
        return f"a table for {hint.__name__} (type {', '.join(registered(hint))})"
    return "none" if hint is NoneType else "a table"


class _Side(NamedTuple):
    """Say what one direction of the conversion reads and writes."""

    method: Callable[[Any, type[Method], str], Any]
    reads: type | UnionType
    writes: type
    path_in: type
    path_out: type


def _convert(value: Any, hint: Any, path: str, side: _Side) -> Any:
    """Return a value in the form of the other side, as its annotation says."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _union(value, arguments, path, side)
    if origin is Literal:
        return _literal(value, hint, path)
    if hint is Path:
        return side.path_out(_scalar(value, side.path_in, path))
    if hint in _SCALARS:
        if hint is float and side is _DECODE and isinstance(value, str) and _FRACTION.fullmatch(value):
            with suppress(OverflowError):  # it stays text, which is refused
                value = float(Fraction(value))
        return _scalar(value, hint, path)
    if origin is tuple and arguments:
        return side.writes([_convert(*item, side) for item in _items(value, hint, path, side)])
    if origin in (dict, Mapping) and arguments[0] is str:
        if not isinstance(value, Mapping):
            raise refusal(path, "a table", value, "write it as a table")
        keys = [_scalar(key, str, path) for key in value]
        return {key: _convert(value[key], arguments[1], join(path, key), side) for key in keys}
    if _is_method(hint):
        return side.method(value, hint, path)
    raise ConfigError(
        f"{path}: expected a field annotated with a scalar, a tuple, a dict[str, ...], a method or a union, "
        f"got {hint}; change the annotation"
    )


def _scalar(value: Any, hint: Any, path: str) -> Any:
    """Return a number, string or boolean as its annotation wants it, or refuse it."""
    expected, advice = _SCALARS[hint]
    takes = int | float if hint is float else hint
    if not isinstance(value, takes) or (isinstance(value, bool) and hint is not bool):
        raise refusal(path, expected, value, advice)
    if hint is not float:
        return hint(value)
    try:
        number = float(value) + 0.0  # -0.0 becomes 0.0, so that equal methods have equal digests
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise refusal(path, expected, value, advice)
    return number


def _literal(value: Any, hint: Any, path: str) -> Any:
    options = get_args(hint)
    for option in options:
        if type(option) is type(value) and option == value:
            return option
    raise refusal(path, _describe(hint), value, nearest(value, [str(option) for option in options]))


def _items(value: Any, hint: Any, path: str, side: _Side) -> list[tuple[Any, Any, str]]:
    """Return (item, annotation, path) for the items of a list or tuple."""
    if not isinstance(value, side.reads):
        advice = "methods hold tuples" if side.writes is list else 'write a list in brackets, such as ["8/255"] or [3]'
        raise refusal(path, _describe(hint), value, advice)
    arguments = get_args(hint)
    if arguments[-1] is ...:
        arguments = arguments[:1] * len(value)
    if len(arguments) != len(value):
        raise refusal(path, _describe(hint), value, f"give {len(arguments)} items")
    return [(value[i], argument, join(path, i)) for i, argument in enumerate(arguments)]


def _union(value: Any, options: tuple[Any, ...], path: str, side: _Side) -> Any:
    """Convert by the first option that takes the value; one of its exact type goes before the others."""
    if NoneType in options:
        string = any(o in (str, Path) or (get_origin(o) is Literal and "none" in get_args(o)) for o in options)
        none = {"type": "none"} if string else "none"
        if side.writes is list and value is None:
            return none
        if side.writes is tuple and value == none:
            return None
    fitting = sorted((o for o in options if _is_plausible(value, o)), key=lambda o: o is not type(value))
    if isinstance(value, Mapping) and len(fitting) > 1:
        named = [o for o in fitting if _is_method(o) and _is_named(value, o)]
        fitting = named or fitting
    if len(fitting) == 1:
        return _convert(value, fitting[0], path, side)
    for option in fitting:
        try:
            return _convert(value, option, path, side)
        except ConfigError:
            continue
    raise refusal(path, " or ".join(map(_describe, options)), value, "give one of these")


def _is_named(table: Mapping[str, Any], family: type[Method]) -> bool:
    """Return whether a table is one for a family: by its type, or without one where the family needs none."""
    return table["type"] in list(registered(family)) if "type" in table else not _is_abstract(family)


def _is_plausible(value: Any, hint: Any) -> bool:
    if _is_method(hint):
        return isinstance(value, hint | Mapping)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple)
    if get_origin(hint) in (dict, Mapping):
        return isinstance(value, Mapping)
    return hint is not NoneType and not isinstance(value, list | tuple | Mapping | Method)


def _encode_method(method: Any, family: type[Method], path: str) -> dict[str, Any]:
    if not isinstance(method, family):
        raise refusal(path, f"a {family.__name__}", method, "build the method first")
    table: dict[str, Any] = {"type": type_name(type(method))}
    for name, (field, hint) in _fields(type(method)).items():
        value = getattr(method, name)
        if value is not None or field.default is not None:
            table[name] = _convert(value, hint, join(path, name), _ENCODE)
    return table


def _decode_method(table: Any, family: type[M], path: str) -> M:
    if not isinstance(table, Mapping):
        raise refusal(path, _describe(family), table, "write its fields as a table")
    cls = _choose(family, table, path)
    known = _fields(cls)
    keys = sorted([*known, "type"])
    for key in table:
        if key not in keys:
            expected = f"a key among {', '.join(keys)}"
            raise ConfigError(f"{join(path, key)}: expected {expected}, got {key!r}; {nearest(key, keys)}")
    values: dict[str, Any] = {}
    for name, (field, hint) in known.items():
        if name in table:
            values[name] = _convert(table[name], hint, join(path, name), _DECODE)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{join(path, name)}: expected {_describe(hint)}, got no value; add the key")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{path or type_name(cls)}: {error}") from error


def _choose(family: type[M], table: Mapping[str, Any], path: str) -> type[M]:
    """Return the class that a table names, or the family where it names none and need not."""
    here = join(path, "type")
    if not _is_abstract(family):
        name = table.get("type", type_name(family))
        if name != type_name(family):
            raise refusal(here, repr(type_name(family)), name, "correct it or leave it out")
        return family
    options = registered(family)
    expected = f"one of {', '.join(options)}" if options else f"a {family.__name__} that is imported"
    if "type" not in table:
        raise ConfigError(f"{here}: expected {expected}, got no type; add the key")
    name = table["type"]
    if not isinstance(name, str) or name not in options:
        raise refusal(here, expected, name, nearest(name, options))
    return options[name]


_ENCODE = _Side(method=_encode_method, reads=tuple, writes=list, path_in=Path, path_out=str)
_DECODE = _Side(method=_decode_method, reads=list | tuple, writes=tuple, path_in=str, path_out=Path)
