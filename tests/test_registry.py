"""Test the way of methods into tables, TOML and back."""

import math
import tomllib
import warnings
from abc import ABC
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquorum.interface import ConfigError, GradientMaskingWarning, InputError, Method
from bitquorum.quantizers import Law, Logistic, Surrogate
from bitquorum.registry import (
    apply_overrides,
    decode,
    digest,
    encode,
    nearest,
    registered,
    to_toml,
    type_name,
)


@dataclass(frozen=True, kw_only=True)
class Shape(Method, ABC):
    """A family without abstract methods."""

    sides: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Square(Shape):
    side: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Circle(Shape):
    radius: float
    centre: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"expected a positive radius, got {self.radius}")


@dataclass(frozen=True, kw_only=True)
class Everything(Method):
    count: int = 3
    ratio: float = 0.5
    active: bool = True
    name: str = "x"
    folder: Path = Path("data")
    mode: Literal["a", "none", 3] = "a"
    maybe: float | None = None
    given: float | None = 2.0
    label: str | None = "l"
    place: Path | None = Path("p")
    choice: Literal["none", "all"] | None = "all"
    steps: tuple[int, ...] = (1, 2)
    gaps: tuple[float | None, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    weights: dict[str, float] = field(default_factory=dict)
    shape: Shape = Square()
    other: Shape | None = None
    shapes: tuple[Shape, ...] = ()
    named: dict[str, Shape] = field(default_factory=dict)
    either: int | float | str | tuple[int, ...] = 1
    law_or_shape: Law | Shape = Square()
    derived: int = field(init=False, default=7)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SHAPES = st.builds(Square, side=FLOATS) | st.builds(
    Circle, radius=st.floats(1e-300, 1e300), centre=st.tuples(FLOATS, FLOATS)
)
EVERYTHING = st.builds(
    Everything,
    count=st.integers(-(2**62), 2**62),
    ratio=FLOATS | st.integers(-5, 5),
    active=st.booleans(),
    name=TEXT | st.just("none"),
    mode=st.sampled_from(["a", "none", 3]),
    maybe=st.none() | FLOATS,
    given=st.none() | FLOATS,
    label=st.none() | TEXT | st.just("none"),
    place=st.sampled_from([None, Path("none"), Path("a/b")]),
    choice=st.sampled_from([None, "none", "all"]),
    steps=st.lists(st.integers(), max_size=3).map(tuple),
    gaps=st.lists(st.none() | FLOATS, max_size=3).map(tuple),
    pair=st.tuples(TEXT, FLOATS),
    weights=st.dictionaries(TEXT, FLOATS, max_size=2),
    shape=SHAPES,
    other=st.none() | SHAPES,
    shapes=st.lists(SHAPES, max_size=2).map(tuple),
    named=st.dictionaries(TEXT | st.just("type"), SHAPES, max_size=2),
    either=st.integers() | FLOATS | TEXT | st.just((1, 2)),
    law_or_shape=SHAPES | st.just(Logistic()),
)


@given(EVERYTHING)
@settings(max_examples=60, deadline=None)
def test_a_method_survives_the_way_through_toml(method: Everything):
    text = to_toml(encode(method))
    back = decode(Everything, tomllib.loads(text))
    assert back == method
    assert repr(back.either) == repr(method.either) or method.either == 0
    assert digest(back) == digest(method) == digest(tomllib.loads(text))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("StochasticRounding", "stochastic-rounding"),
        ("PGD", "pgd"),
        ("APGDTargeted", "apgd-targeted"),
        ("ResNet18", "resnet18"),
        ("WideResNet", "wide-resnet"),
        ("PreActResNet18", "pre-act-resnet18"),
        ("ResNetCifar", "resnet-cifar"),
        ("DigitsNet", "digitsnet"),
        ("Network", "network"),
        ("Net", "net"),
        ("CIFARconv", "cifarconv"),
        ("MNISTconv", "mnistconv"),
        ("MIConverter", "mi-converter"),
        ("L2Norm", "l2-norm"),
        ("PGD2", "pgd2"),
        ("KSGEstimator", "ksg-estimator"),
        ("SquareAttack", "square-attack"),
        ("_Hidden", "hidden"),
    ],
)
def test_type_names(name: str, expected: str):
    assert type_name(type(name, (), {})) == expected


def test_every_method_of_the_quantizers_is_its_own_table():
    for name in registered(Law):
        law = decode(Law, {"type": name})
        assert decode(Law, encode(law)) == law
    surrogate = Surrogate(backward="gumbel", width=2.0)
    assert encode(surrogate) == {"type": "surrogate", "backward": "gumbel", "width": 2.0}


def test_the_form_of_a_table():
    table = encode(Everything(given=None, label=None, choice=None, folder=Path("a") / "b"))
    assert list(table)[:3] == ["type", "count", "ratio"]
    assert "maybe" not in table
    assert "derived" not in table
    assert table["given"] == "none"
    assert table["label"] == table["choice"] == {"type": "none"}
    assert table["folder"] == "a/b"
    assert table["pair"] == ["a", 1.0]
    assert table["shape"] == {"type": "square", "side": 1.0}


def test_equal_methods_have_equal_digests():
    assert digest(Square(side=1)) == digest(Square(side=1.0)) != digest(Square(side=2.0))
    assert encode(Square(side=1)) == {"type": "square", "side": 1.0}
    assert isinstance(encode(Square(side=1))["side"], float)
    assert digest(Square(side=-0.0)) == digest(Square(side=0.0))
    assert len(digest(Square())) == 12
    assert digest({"type": "square", "side": 1.0}) == digest(Square())


def test_defaults_fill_in_and_an_integer_becomes_a_float():
    assert decode(Shape, {"type": "circle", "radius": 2}) == Circle(radius=2.0)
    assert isinstance(decode(Square, {"side": 2}).side, float)
    assert decode(Everything, {"maybe": "none", "given": "none", "other": "none"}) == Everything(given=None)
    assert decode(Everything, {"label": "none"}).label == "none"


@pytest.mark.parametrize(
    ("table", "start", "parts"),
    [
        ({"cuont": 1}, "cuont: expected a key among active, ", ["'cuont'", "did you mean 'count'?"]),
        ({"zzzz": 1}, "zzzz: ", ["choose one of these"]),
        ({"count": 1.0}, "count: expected an integer, got 1.0 (float); ", []),
        ({"count": True}, "count: expected an integer, got True", []),
        ({"ratio": True}, "ratio: expected a finite number, got True", []),
        ({"ratio": math.nan}, "ratio: expected a finite number, got nan", []),
        ({"ratio": math.inf}, "ratio: ", []),
        ({"ratio": 10**400}, "ratio: ", []),
        ({"ratio": "1"}, "ratio: ", ["without quotes"]),
        ({"active": 1}, "active: expected true or false, got 1", []),
        ({"name": 1}, "name: expected a string", ["quotes"]),
        ({"folder": 1}, "folder: expected a string", []),
        ({"mode": "b"}, "mode: expected one of 'a', 'none', 3, got 'b'", []),
        ({"mode": True}, "mode: ", []),
        ({"steps": 1}, "steps: expected a list of items, each an integer", ["brackets"]),
        ({"steps": [1, "a"]}, "steps.1: expected an integer, got 'a'", []),
        ({"pair": ["a"]}, "pair: expected a list of 2 items (a string; a finite number)", ["give 2 items"]),
        ({"weights": {"a": "b"}}, "weights.a: expected a finite number", []),
        ({"weights": 3}, "weights: expected a table", []),
        ({"shape": 3}, "shape: expected a table for Shape (type circle, square)", []),
        ({"shape": {"side": 1.0}}, "shape.type: expected one of circle, square, got no type", []),
        (
            {"shape": {"type": "sqare"}},
            "shape.type: expected one of circle, square",
            ["did you mean 'square'?"],
        ),
        ({"shape": {"type": 3}}, "shape.type: ", []),
        ({"shape": {"type": "circle"}}, "shape.radius: expected a finite number, got no value; add", []),
        ({"shape": {"type": "circle", "radius": -1}}, "shape: expected a positive radius, got -1.0", []),
        ({"shapes": [{"type": "square", "sid": 1}]}, "shapes.0.sid: ", ["did you mean 'side'?"]),
        ({"other": 3}, "other: expected a table for Shape", ["or none"]),
        ({"other": {"type": "x"}}, "other.type: ", []),
        ({"either": {}}, "either: expected an integer or a finite number or a string or a list", []),
        ({"either": ["a"]}, "either.0: expected an integer", []),
        ({"law_or_shape": {"type": "square", "sid": 1}}, "law_or_shape.sid: ", ["'side'"]),
        ({"law_or_shape": {"type": "x"}}, "law_or_shape: ", []),
        ({"derived": 3}, "derived: ", []),
        ({"type": "square"}, "type: expected 'everything', got 'square'", []),
    ],
)
def test_a_bad_table_is_refused_by_path(table: dict[str, Any], start: str, parts: list[str]):
    with pytest.raises(ConfigError) as caught:
        decode(Everything, table)
    assert str(caught.value).startswith(start)
    assert all(part in str(caught.value) for part in parts)


def test_a_bad_root_is_refused():
    with pytest.raises(ConfigError, match=r"^circle: expected a positive radius"):
        decode(Circle, {"radius": 0})
    with pytest.raises(ConfigError, match=r"^named: expected a table, got 3 .* write it as a table"):
        decode(Everything, {"named": 3})
    assert issubclass(ConfigError, InputError)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        (Everything(steps=[1]), "steps"),  # type: ignore[arg-type]
        (Everything(ratio=math.nan), "ratio"),
        (Everything(shapes=(Square(side="a"),)), "shapes.0.side"),  # type: ignore[arg-type]
        (Everything(shape=Logistic()), "shape"),  # type: ignore[arg-type]
        (Everything(count=None), "count"),  # type: ignore[arg-type]
    ],
)
def test_a_method_that_breaks_its_annotations_is_refused(method: Method, path: str):
    with pytest.raises(ConfigError, match=rf"^{path}: expected "):
        encode(method)


def decode_quietly(table: dict[str, Any]) -> Law:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientMaskingWarning)
        return decode(Law, table)


def test_warnings_of_the_constructor_pass_through():
    with pytest.warns(GradientMaskingWarning):
        law = decode(Law, {"type": "logistic", "scale": 0.05})
    assert law == decode_quietly(encode(law))


def test_odd_classes_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Lonely(Method, ABC):
        pass

    @dataclass(frozen=True, kw_only=True)
    class Typed(Method):
        type: str = "a"

    @dataclass(frozen=True, kw_only=True)
    class Odd(Method):
        value: complex = 1j

    @dataclass(frozen=True, kw_only=True)
    class Twin(Lonely):
        pass

    assert registered(Lonely) == {"twin": Twin}
    type("TWIN", (Lonely,), {})
    with pytest.raises(ConfigError, match="'twin'"):
        registered(Lonely)
    with pytest.raises(ConfigError, match="no field named type"):
        encode(Typed())
    with pytest.raises(ConfigError, match="value: expected a field annotated"):
        encode(Odd())
    with pytest.raises(ConfigError, match="expected strings"):
        digest({"a": Path("x")})


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('."\\\n\r\t\x00\x7f\x85 =#[]'))
LEAVES = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | ANY_TEXT
    | st.sampled_from([5e-324, 1.7976931348623157e308, -0.0, 1e16, 1e22])
)
TABLES = st.dictionaries(
    ANY_TEXT,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


@given(TABLES)
@settings(max_examples=200, deadline=None)
def test_tomllib_reads_what_to_toml_writes(table: dict[str, Any]):
    back = tomllib.loads(to_toml(table))
    assert back == table
    assert to_toml(back) == to_toml(table)


def test_toml_layout():
    table = {
        "arms": [{"name": "a", "law": {"scale": 0.25}}, {}],
        "a": {"b": {"x": 1}, "empty": {}},
        "long": list(range(1000, 1030)),
        "mixed": [1, {"k": "v"}],
        "odd key": 'say "hi"\n',
    }
    numbers = "".join(f"    {i},\n" for i in range(1000, 1030))
    assert to_toml(table) == (
        f"long = [\n{numbers}]\n"
        'mixed = [1, {k = "v"}]\n"odd key" = "say \\"hi\\"\\n"\n'
        "\n[a.b]\nx = 1\n\n[a.empty]\n"
        '\n[[arms]]\nname = "a"\n\n[arms.law]\nscale = 0.25\n\n[[arms]]\n'
    )
    assert to_toml({}) == ""
    assert tomllib.loads(to_toml({"a": math.inf, "t": (1, 2)})) == {"a": math.inf, "t": [1, 2]}


@pytest.mark.parametrize("bad", [{"a": {"b": None}}, {"a": {"b": [1, {"c": None}]}}, {"a": {"b": "\ud800"}}])
def test_what_toml_lacks_is_refused_by_path(bad: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"^a\.b: expected "):
        to_toml(bad)


def test_a_key_that_is_no_string_is_refused():
    with pytest.raises(ConfigError, match="a string as a key"):
        to_toml({"a": {1: 2}})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.epochs=3", {"trainer": {"epochs": 3}}),
        (" trainer.epochs = 3 ", {"trainer": {"epochs": 3}}),
        ("trainer.new=1e-3", {"trainer": {"epochs": 1, "new": 1e-3}}),
        ("arms.0.name=x", {"arms": [{"name": "x"}, 5]}),
        ("arms.1={a=1}", {"arms": [{"name": "a"}, {"a": 1}]}),
        ("eps=[0.01,0.02]", {"eps": [0.01, 0.02]}),
        ("eps=true", {"eps": True}),
        ("eps=2024-01-02", {"eps": "2024-01-02"}),
        ('eps="3"', {"eps": "3"}),
        ("eps=", {"eps": ""}),
        ("eps=a=b c", {"eps": "a=b c"}),
        ("eps=1\nb=2", {"eps": "1\nb=2"}),
        ('"dotted.key".a=2', {"dotted.key": {"a": 2}}),
        ("trainer.augment.crop=2", {"trainer": {"epochs": 1, "augment": {"crop": 2}}}),
        ("data.train=2", {"data": {"train": 2}}),
    ],
)
def test_overrides(override: str, expected: dict[str, Any]):
    table = {"trainer": {"epochs": 1}, "arms": [{"name": "a"}, 5], "dotted.key": {}}
    before = repr(table)
    assert apply_overrides(table, [override]) == {**table, **expected}
    assert repr(table) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs.b=3", r"^trainer\.epochs: expected a table or a list, got 1"),
        ("arms.2.name=3", r"^arms: expected an index below 1, got '2'"),
        ("arms.-1.name=3", "index"),
        ("arms.1=3", "index"),
        ("trainer.epochs", "expected an assignment, got 'trainer.epochs'"),
        ("=3", "expected an assignment"),
        ("#=3", "expected an assignment"),
        ("a b=3", "expected an assignment"),
    ],
)
def test_bad_overrides(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"trainer": {"epochs": 1}, "arms": [{"name": "a"}]}, [override])


def test_nearest():
    assert nearest("lograthmic", ["logistic", "gaussian"]) == "did you mean 'logistic'?"
    assert nearest("q", []) == "choose one of these"
