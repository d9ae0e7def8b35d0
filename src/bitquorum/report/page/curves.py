"""Plot accuracy against epsilon, the ladder's descent, and the training."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bitquorum.files import extended
from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.figures import INK, Axis, Figure, Selector, Series, Style, slug
from bitquorum.report.page.look import SHARE, Look, banded, legend, numbered, radius, radius_axis
from bitquorum.report.tables import epsilon_label

_WORST = "worst over the attacks"
_POINTS = {
    "clean": Style(color=INK, marker=0, mode="markers"),
    "claim as worded": Style(color=0, marker=2, mode="markers"),
    "worst case over the ladder": Style(color=1, marker=1, mode="markers"),
    "worst of several tries": Style(color=1, marker=1, hollow=True, mode="markers"),
}
_OPINION = 3  # the first marker of second opinions


def security(view: RunView, answers: Sequence[Row], look: Look, name: str) -> Figure:
    """Return accuracy against epsilon: every arm under the chosen attack."""
    styles = {arm: replace(banded(look.arm(arm)), width=2.5) for arm in distinct(answers, "arm")}
    rows = [
        _point(view, row, attack=attack, series=arm)
        for attack in _attacks(answers)
        for arm in styles
        for row in _curve(answers, arm, attack)
    ]
    series, keys = legend(styles)
    points = {}
    for row in _judged_by_ladder(answers):
        points[f"{row['arm']}, {row['attack']}"] = replace(look.arm(row["arm"]), hollow=True, mode="markers")
        rows.append(_point(view, row, attack=_WORST, series=f"{row['arm']}, {row['attack']}"))
    for point, style in points.items():
        series[point] = Series(style=style, keys=(point.partition(", ")[0],))
    return Figure(
        name=f"security-{slug(view.name)}-{name}",
        title="Accuracy under the chosen attack",
        run=view.name,
        kind="lines",
        rows=rows,
        x=radius_axis(),
        y=SHARE,
        series=series,
        keys=keys,
        selectors=(Selector(column="attack", title="Attack", default=_hardest(answers)),),
    )


def security_by_arm(view: RunView, answers: Sequence[Row], name: str) -> Figure:
    """Return accuracy against epsilon: every attack on the chosen arm, the worst bold."""
    attacks = _attacks(answers)[::-1]
    styles = {attack: banded(numbered(number)) for number, attack in enumerate(attacks)}
    if _WORST in styles:
        styles[_WORST] = Style(color=INK, width=4.0, band=True)
    arms = distinct(answers, "arm")
    rows = [
        _point(view, row, arm=arm, series=attack)
        for arm in arms
        for attack in attacks
        for row in _curve(answers, arm, attack)
    ]
    series, keys = legend(styles)
    return Figure(
        name=f"security-by-arm-{slug(view.name)}-{name}",
        title="Every attack on the chosen ensemble",
        run=view.name,
        kind="lines",
        rows=rows,
        x=radius_axis(),
        y=SHARE,
        series=series,
        keys=keys[::-1],
        selectors=(Selector(column="arm", title="Ensemble", default=arms[-1]),),
    )


def answers_of(part: Part | None, ladders: Sequence[Part]) -> list[Row]:
    """Return what an evaluation and ladders in the maximum norm leave, each row with the digest of its source."""
    rows = []
    if part is not None:
        rows += [extended(row, source=part.digest, attack=_attack_name(row["attack"])) for row in part.rows]
    names = [ladder.config.get("name") for ladder in ladders]
    for ladder in ladders:
        if ladder.config.get("norm", "linf") == "linf":
            alone = names.count(ladder.config.get("name")) == 1
            title = f"ladder {ladder.config.get('name') if alone else ladder.label}"
            rows += [
                extended(row, source=ladder.digest, attack=_ladder_name(row["attack"], title))
                for row in select(ladder.rows, name="accuracy")
            ]
    return rows


def bracket_plot(view: RunView, part: Part) -> Figure:
    """Return clean accuracy, the claim and the worst case of each arm side by side, with intervals."""
    rows = []
    for row in part.rows:
        name = _bracket_name(row)
        if name is None:
            continue
        radii = [row["epsilon"]] if row["epsilon"] else distinct(part.rows, "epsilon")
        rows += [
            {
                **_facts(view, row),
                "epsilon": epsilon_label(epsilon, row.get("norm")),
                "series": name,
                "x": row["value"],
                "x_low": row.get("low"),
                "x_high": row.get("high"),
                "y": row["arm"],
                "label": row["name"] if name == "worst of several tries" else row["attack"],
            }
            for epsilon in radii
            if epsilon
        ]
    names = distinct(rows, "series")
    others = [name for name in names if name not in _POINTS]
    opinions = {
        name: Style(color=number, marker=number, mode="markers") for number, name in enumerate(others, _OPINION)
    }
    styles = {name: _POINTS.get(name) or opinions[name] for name in names}
    series, keys = legend(styles)
    return Figure(
        name=f"bracket-{slug(view.name)}-{part.digest}",
        title="Clean, claim and worst case over the ladder",
        run=view.name,
        kind="dots",
        rows=rows,
        x=SHARE,
        y=Axis(title=""),
        series=series,
        keys=keys,
        selectors=(Selector(column="epsilon", title="Epsilon"),),
    )


def descent(view: RunView, part: Part, look: Look) -> Figure:
    """Return the worst case so far after each rung of the ladder."""
    rows = [
        {
            **_facts(view, row),
            "epsilon": epsilon_label(row["epsilon"], row.get("norm")),
            "series": row["arm"],
            "x": row.get("step", 0),
            **_value(row),
            "label": f"{row['attack']}: met {row.get('attacked', 0)}, broke {row.get('broke', 0)}",
        }
        for row in select(part.rows, name="left")
    ]
    series, keys = legend({arm: banded(look.arm(arm)) for arm in distinct(rows, "arm")})
    return Figure(
        name=f"descent-{slug(view.name)}-{part.digest}",
        title="Worst case so far, rung after rung",
        run=view.name,
        kind="lines",
        rows=rows,
        x=Axis(title="rung (0: clean images)"),
        y=SHARE,
        series=series,
        keys=keys,
        selectors=(Selector(column="epsilon", title="Epsilon"),),
    )


def training(view: RunView, look: Look) -> Figure | None:
    """Return loss, learning rate and each term of the objective against the step; `None` where no row is stored."""
    names = dict.fromkeys(key for rows in view.train.values() for row in rows for key in sorted(row))
    terms = [name for name in names if name not in ("step", "split", "loss", "lr")]
    panels = {"loss": "loss", **{term: term for term in terms}, "lr": "learning rate"}
    rows = [
        {"run": view.name, "arm": arm, "panel": title, "series": arm, "x": row.get("step"), "y": row[column]}
        for column, title in panels.items()
        for arm, steps in view.train.items()
        for row in steps
        if isinstance(row.get(column), int | float)
    ]
    if not rows:
        return None
    series, keys = legend({arm: replace(look.arm(arm), mode="lines") for arm in view.train})
    return Figure(
        name=f"training-{slug(view.name)}",
        title="Training: the loss and each of its terms",
        run=view.name,
        kind="lines",
        rows=rows,
        x=Axis(title="step"),
        y=Axis(title=""),
        series=series,
        keys=keys,
    )


def _attacks(rows: Sequence[Row]) -> list[str]:
    """Return the attacks, the worst case first."""
    names = [name for name in distinct(rows, "attack") if name != "clean"]
    return sorted(names, key=lambda name: name != _WORST)


def _hardest(rows: Sequence[Row]) -> str | None:
    """Return the worst case of the evaluation, or else of a ladder."""
    names = _attacks(rows)
    return next((name for name in names if name == _WORST or name.endswith(": worst case")), None)


def _attack_name(attack: str) -> str:
    return _WORST if attack == "worst" else attack


def _ladder_name(attack: str, title: str) -> str:
    if attack == "clean":
        return attack
    return f"{title}: " + ("worst case" if attack == "worst" else "claim as worded")


def _judged_by_ladder(answers: Sequence[Row]) -> list[Row]:
    """Return the ladders' worst cases, to be set beside the worst case of an evaluation."""
    if not select(answers, attack=_WORST):
        return []
    return [row for row in answers if row["attack"].startswith("ladder ") and row["attack"].endswith(": worst case")]


def _curve(rows: Sequence[Row], arm: str, attack: str) -> list[Row]:
    """Return an arm's rows under an attack by epsilon, with clean images of the same source at zero."""
    found = select(rows, arm=arm, attack=attack)
    sources = distinct(found, "source")
    clean = [row for row in select(rows, arm=arm, attack="clean") if row["source"] in sources]
    return sorted([*clean, *found], key=lambda row: row["epsilon"])


def _point(view: RunView, row: Row, **more: Any) -> dict[str, Any]:
    facts = {**_facts(view, row), "epsilon": row["epsilon"], **more}
    return {**facts, "x": radius(row["epsilon"]), **_value(row), "label": row["attack"]}


def _facts(view: RunView, row: Row) -> dict[str, Any]:
    columns = ("arm", "members", "images", "draws")
    return {"run": view.name, **{name: row.get(name) for name in columns}}


def _value(row: Row) -> dict[str, Any]:
    return {"y": row["value"], "y_low": row.get("low"), "y_high": row.get("high")}


def _bracket_name(row: Row) -> str | None:
    """Return which point of the bracket a row is; `None` for the rungs."""
    name, attack = str(row["name"]), str(row["attack"])
    if name == "second opinion":
        return attack
    if name.startswith("worst of "):
        return "worst of several tries"
    if name != "accuracy":
        return None
    return {"clean": "clean", "worst": "worst case over the ladder"}.get(attack, "claim as worded")
