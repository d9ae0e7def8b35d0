"""Plot the adversarial information plane, the members' pairs, and noise and rate of each layer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bitquorum.information import independent_error_information, mutual_information, symmetric_channel
from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.figures import INK, Axis, Figure, Key, Selector, Series, Style, slug
from bitquorum.report.page.look import SHARE, Look, legend, level_label, numbered, threat_label

KINDS = ("clean", "white-box", "gradient-free", "ladder", "transfer", "corruption", "noise")

# Quantity of the store -> what the page calls it.
PAIR_QUANTITIES = {
    "pair_mi": "pairwise MI, mean of I(f_i; f_j), in bits",
    "residual": "residual: pairwise MI above independent errors, in bits",
    "excess": "excess over the members' own confusions, in bits",
    "conditional_mi": "conditional MI, mean of I(f_i; f_j | Y), in bits",
}
LABEL_QUANTITY = {"label_mi": "label MI, mean of I(f_i; Y), in bits"}

_REFERENCE = "reference"
_STEPS = 90


def plane(views: Sequence[RunView], look: Look) -> Figure | None:
    """Return accuracy against what members share, a trajectory for each threat; `None` without a stored plane.

    The reference is $(I(r), r)$: members of accuracy r that err independently, as accurate together as each alone.
    """
    return _plane(views, look, PAIR_QUANTITIES, "plane", "The plane: accuracy against what the members share")


def label_plane(views: Sequence[RunView], look: Look) -> Figure | None:
    """Return accuracy against what a member knows of the label, which one member has too."""
    return _plane(views, look, LABEL_QUANTITY, "label-plane", "Accuracy against what a member tells of the label")


def matrices(view: RunView, part: Part) -> Figure | None:
    """Return the MI of each pair of members under the chosen threat, with entropies on the diagonal."""
    rows: list[dict[str, Any]] = []
    for row in part.rows:
        names = member_names(row)
        for i, line in enumerate(row.get("pair_matrix") or ()):
            rows += [
                {
                    **_facts(view, row),
                    "threat": threat_label(row),
                    "panel": row["arm"],
                    "series": row["arm"],
                    "x": names[j],
                    "y": names[i],
                    "z": value,
                    "label": "H(f_i)" if i == j else "I(f_i; f_j)",
                }
                for j, value in enumerate(line)
            ]
    if not rows:
        return None
    return Figure(
        name=f"pairs-{slug(view.name)}-{part.digest}",
        title="MI between members in bits",
        run=view.name,
        kind="heat",
        rows=rows,
        x=Axis(title=""),
        y=Axis(title=""),
        selectors=(Selector(column="threat", title="Threat"),),
        ceiling=max(row["z"] for row in rows if row["z"] is not None),
    )


def layers(view: RunView, part: Part) -> Figure | None:
    """Return noise and rate of every quantizer of the chosen arm; `None` where no row is stored."""
    rows: list[dict[str, Any]] = []
    for column, panel in (("noise_bits", "noise H(Q(x) | x)"), ("rate_bits", "rate I(x; Q(x))")):
        rows += [
            {
                "run": view.name,
                "arm": row["arm"],
                "quantizer": f"{row['role']}s",
                "panel": panel,
                "series": f"member {row['member'] + 1}",
                "x": row[column],
                "y": row["layer"],
                "label": f"{row['bits']} bits, {row['law']}",
                "images": row.get("images"),
            }
            for row in part.sheet("layers")
            if row.get(column) is not None
        ]
    if not rows:
        return None
    noisiest = max(part.sheet("layers"), key=lambda row: row.get("noise_bits") or 0.0)
    names = sorted(distinct(rows, "series"))
    series, keys = legend({name: numbered(number) for number, name in enumerate(names)})
    return Figure(
        name=f"layers-{slug(view.name)}-{part.digest}",
        title="Noise and rate of each quantizer",
        run=view.name,
        kind="bars",
        rows=rows,
        x=Axis(title="bits a value", low=0.0),
        y=Axis(title=""),
        series=series,
        keys=keys,
        selectors=(
            Selector(column="arm", title="Ensemble", default=noisiest["arm"]),
            Selector(column="quantizer", title="Quantizers of", default=f"{noisiest['role']}s"),
        ),
    )


def _plane(views: Sequence[RunView], look: Look, quantities: dict[str, str], name: str, title: str) -> Figure | None:
    sources = [(view, part, _source(view, part)) for view in views for part in view.planes]
    several = len(sources) > 1
    rows: list[dict[str, Any]] = []
    series: dict[str, Series] = {}
    attack: str | None = None  # shown first: the last one, as a rule the strongest
    for number, (view, part, source) in enumerate(sources):
        for arm in part.arms():
            style = replace(look.arm(arm), dash=number) if several else look.arm(arm)
            for threat in _threats(part, arm):
                kind = str(threat[-1]["kind"])
                attack = str(threat[-1]["threat"]) if kind == "white-box" else attack
                trajectory = " / ".join([*([source] if several else []), arm, str(threat[-1]["threat"])])
                marked = replace(style, marker=_kind_number(kind), width=1.5)
                series[trajectory] = Series(style=marked, keys=(arm, kind, *([source] if several else [])))
                rows += [
                    _on_plane(view, row, str(threat[-1]["threat"]), trajectory, column, label)
                    for column, label in quantities.items()
                    for row in threat
                    if row.get(column) is not None
                ]
    if not rows:
        return None
    classes = sorted({row["classes"] for _, part, _ in sources for row in part.rows if row.get("classes")})
    for count in classes:
        label = f"{_REFERENCE}: independent errors" + (f", {count} classes" if len(classes) > 1 else "")
        series[label] = Series(style=Style(color=INK, dash=1, width=1.5, mode="lines"), keys=(label,))
        rows += _reference(count, label, quantities)
    return Figure(
        name=name,
        title=title,
        kind="lines",
        rows=rows,
        x=Axis(title=next(iter(quantities.values()))),
        y=SHARE,
        series=series,
        keys=_plane_keys(rows, series, look, sources if several else []),
        selectors=(
            *((Selector(column="measure", title="Across"),) if len(quantities) > 1 else ()),
            Selector(column="threat", title="Threat", default=attack, every="all threats"),
        ),
        x_titles={label: label for label in quantities.values()},
    )


def _plane_keys(
    rows: Sequence[Row],
    series: dict[str, Series],
    look: Look,
    sources: Sequence[tuple[RunView, Part, str]],
) -> tuple[Key, ...]:
    """Return one key for each ensemble, run, kind of threat and reference that has a point."""
    used = {key for name in distinct(rows, "series") for key in series[name].keys}
    arms = [Key(name=arm, group="ensemble", style=replace(look.arm(arm), mode="lines")) for arm in look.arms]
    if sources:
        arms = [replace(key, style=replace(key.style, dash=0)) for key in arms]
    first = {view.name: source for view, _, source in reversed(sources)}
    runs = [
        Key(name=source, group="run", style=Style(dash=number, mode="lines"), hidden=first[view.name] != source)
        for number, (view, _, source) in enumerate(sources)
    ]
    kinds = [Key(name=kind, group="threat", style=Style(marker=_kind_number(kind), mode="markers")) for kind in KINDS]
    references = [
        Key(name=name, style=series[name].style, group="") for name in series if name.startswith(f"{_REFERENCE}:")
    ]
    return tuple(key for key in (*arms, *runs, *kinds, *references) if key.name in used)


def _threats(part: Part, arm: str) -> list[list[Row]]:
    """Return an arm's rows threat by threat in the order of their strength, each begun by clean images."""
    rows = select(part.rows, arm=arm)
    clean = select(rows, kind="clean")
    found = []
    for threat in distinct(rows, "threat"):
        levels = sorted(
            (row for row in select(rows, threat=threat) if row["kind"] != "clean"), key=lambda row: row["level"]
        )
        if levels:
            found.append([*clean, *levels])
    return found or [clean]


def _on_plane(view: RunView, row: Row, threat: str, series: str, column: str, measure: str) -> dict[str, Any]:
    return {
        **_facts(view, row),
        "threat": threat,
        "kind": row["kind"],
        "level": row["level"],
        "measure": measure,
        "series": series,
        "x": row[column],
        "x_low": row.get(f"{column}_low"),
        "x_high": row.get(f"{column}_high"),
        "y": row["accuracy"],
        "y_low": row.get("accuracy_low"),
        "y_high": row.get("accuracy_high"),
        "marker": _kind_number(row["kind"]),
        "label": f"{row['threat']} {level_label(row)}".strip(),
    }


def _reference(classes: int, series: str, quantities: dict[str, str]) -> list[dict[str, Any]]:
    """Return the curve of members that err independently, from chance to no error, on each axis that it has."""
    shares = [1 / classes + (1 - 1 / classes) * step / _STEPS for step in range(_STEPS + 1)]
    values = {
        "pair_mi": lambda share: independent_error_information(share, classes),
        "residual": lambda share: 0.0,
        "label_mi": lambda share: float(mutual_information(symmetric_channel(share, classes))),
    }
    return [
        {
            "measure": label,
            "series": series,
            "x": max(0.0, values[column](share)),
            "y": share,
            "label": "members that err independently",
        }
        for column, label in quantities.items()
        if column in values
        for share in shares
    ]


def _source(view: RunView, part: Part) -> str:
    return view.name if len(view.planes) == 1 else f"{view.name}, plane {part.digest}"


def _kind_number(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def member_names(row: Row) -> list[str]:
    """Return the members' names of a row, told apart by their number; a member that sees a look of its own is one."""
    count = len(row.get("pair_matrix") or ())
    words = str(row.get("members", "")).split()
    looks = [""]
    for kind in ("mirrored", "shifted"):
        looks += [f"{look} {kind}".strip() for look in looks] if kind in words else []
    names = [f"{word} {look}" for look in looks for word in words if word not in ("mirrored", "shifted")]
    names = names if len(names) == count else [""] * count
    return [f"{number} {name}".strip() for number, name in enumerate(names, start=1)]


def _facts(view: RunView, row: Row) -> dict[str, Any]:
    return {"run": view.name, **{name: row.get(name) for name in ("arm", "members", "images", "draws")}}
