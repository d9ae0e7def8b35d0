"""Plot what detectors tell apart: ROC curves, areas below them, and the scores themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.figures import INK, Axis, Figure, Selector, Series, Style, slug
from bitquorum.report.page.look import banded, legend, level_label, numbered, radius, radius_axis, threat_label

AWARE = "attack that knows the detector"
WORST = {"worst": "", "worst with aware": ", detector known"}
COUNTS = {
    "right_or_rejected": "right or rejected",
    "accepted_right": "accepted and right",
    "fooled": "accepted and wrong",
}

UNITS = {
    "prediction-mi": "bits",
    "pointwise-mi": "bits",
    "window-mi": "bits",
    "max-softmax": "1 less a probability",
    "disagreement": "share of pairs",
    "energy": "nats",
    "entropy": "bits",
}

_TOLERANCE = 0.004  # how far a simplified ROC curve may lie from the stored one
_RATE = {"percent": True, "low": -0.02, "high": 1.02}


def roc(view: RunView, part: Part) -> Figure | None:
    """Return the ROC curves of all statistics under the chosen threat, an arm a panel."""
    curves = part.sheet("curves")
    rows: list[dict[str, Any]] = []
    for curve in curves:
        facts = _facts(view, curve)
        for x, y in simplify(curve["fpr"], curve["tpr"]):
            rows.append({**facts, "panel": curve["arm"], "series": curve["statistic"], "x": x, "y": y})
    if not rows:
        return None
    rows += [
        {"panel": arm, "series": "chance", "x": end, "y": end} for arm in distinct(rows, "arm") for end in (0.0, 1.0)
    ]
    series, keys = legend(_statistics(curves, mode="lines"))
    series["chance"] = Series(style=Style(color=INK, dash=2, width=1.0, mode="lines"))
    return Figure(
        name=f"roc-{slug(view.name)}-{part.digest}",
        title="ROC curves of the detectors",
        run=view.name,
        kind="lines",
        rows=rows,
        x=Axis(title="false positives", **_RATE),
        y=Axis(title="true positives", **_RATE),
        series=series,
        keys=keys,
        selectors=(Selector(column="threat", title="Threat", default=usual_threat(curves)),),
    )


def areas(view: RunView, part: Part) -> Figure | None:
    """Return the area below each ROC curve with its interval at the chosen strength, an arm a panel."""
    found = [row for row in select(part.rows, name="detection") if row.get("auroc") is not None]
    rows = [
        {
            **_facts(view, row),
            "epsilon": level_label(row),
            "panel": row["arm"],
            "series": AWARE if row.get("aware") else row["threat"],
            "x": row["auroc"],
            "x_low": row.get("auroc_low"),
            "x_high": row.get("auroc_high"),
            "y": row["statistic"],
            "label": f"{row['threat']}; {row.get('successes')} attacked images are positives",
        }
        for row in found
    ]
    if not rows:
        return None
    threats = [name for name in distinct(rows, "series") if name != AWARE]
    styles = {
        name: replace(numbered(number), hollow=True, mode="markers") for number, name in enumerate(threats, start=2)
    }
    series, keys = legend({**styles, AWARE: Style(color=1, mode="markers")})
    return Figure(
        name=f"auroc-{slug(view.name)}-{part.digest}",
        title="Area below the ROC curve",
        run=view.name,
        kind="dots",
        rows=rows,
        x=Axis(title="AUROC", low=0.0, high=1.02),
        y=Axis(title=""),
        series=series,
        keys=keys,
        selectors=(Selector(column="epsilon", title="Epsilon", default=level_label({"level": usual_level(found)})),),
    )


def rejection(view: RunView, part: Part) -> Figure | None:
    """Return accuracy with rejection against epsilon in the worst case, counted both ways, an arm a panel."""
    rows: list[dict[str, Any]] = []
    for row in select(part.rows, name="rejection"):
        if row.get("threat") not in WORST:
            continue
        rows += [
            {
                **_facts(view, row),
                "statistic": row["statistic"],
                "rate": f"{100 * row['false_positives']:g} %",
                "panel": row["arm"],
                "series": f"{text}{WORST[row['threat']]}",
                "x": radius(row["level"] or 0.0),
                "y": row[name],
                "y_low": row.get(f"{name}_low"),
                "y_high": row.get(f"{name}_high"),
            }
            for name, text in COUNTS.items()
            if row.get(name) is not None
        ]
    if not rows:
        return None
    styles = {}
    for number, text in enumerate(COUNTS.values()):
        styles[text] = banded(numbered(number))
        styles[f"{text}{WORST['worst with aware']}"] = replace(numbered(number), hollow=True, mode="markers")
    series, keys = legend(styles)
    return Figure(
        name=f"rejection-{slug(view.name)}-{part.digest}",
        title="Accuracy with rejection, worst case for each image",
        run=view.name,
        kind="lines",
        rows=sorted(rows, key=lambda row: row["x"]),
        x=radius_axis(),
        y=Axis(title="share of images", **_RATE),
        series=series,
        keys=keys,
        selectors=(
            Selector(column="statistic", title="Statistic", default=_known_statistic(part)),
            Selector(column="rate", title="False positives"),
        ),
    )


def scores(view: RunView, part: Part) -> Figure | None:
    """Return histograms of a statistic on clean and attacked images, an arm a panel."""
    rows: list[dict[str, Any]] = []
    curves = part.sheet("curves")
    for curve in curves:
        edges = curve["edges"]
        for series, column in (("clean", "clean_counts"), ("attacked", "attacked_counts")):
            counts = curve[column]
            total = max(1, sum(counts))
            rows += [
                {
                    **_facts(view, curve),
                    "statistic": curve["statistic"],
                    "panel": curve["arm"],
                    "series": series,
                    "x": low,
                    "x_high": high,
                    "y": count / total,
                    "label": f"{count} of {total} {'windows' if curve['statistic'] == 'window-mi' else 'images'}",
                }
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
    if not rows:
        return None
    series, keys = legend({"clean": Style(color=0, mode="lines"), "attacked": Style(color=1, dash=1, mode="lines")})
    return Figure(
        name=f"scores-{slug(view.name)}-{part.digest}",
        title="Scores of clean and attacked images",
        run=view.name,
        kind="steps",
        rows=rows,
        x=Axis(title="statistic"),
        x_titles={name: f"{name} ({UNITS[name]})" for name in distinct(rows, "statistic") if name in UNITS},
        y=Axis(title="share of images or windows", percent=True, low=0.0),
        series=series,
        keys=keys,
        selectors=(
            Selector(column="statistic", title="Statistic"),
            Selector(column="threat", title="Threat", default=usual_threat(curves)),
        ),
    )


def usual_level(rows: Sequence[Row]) -> float | None:
    """Return the strength to open with: the one of attacks that know the detector, else the middle one."""
    aware = [row for row in rows if row.get("aware")]
    levels = sorted(distinct(aware or rows, "level"))
    return levels[len(levels) // 2] if levels else None


def usual_threat(rows: Sequence[Row]) -> str | None:
    """Return the threat to open with: the last of those that do not know the detector, at `usual_level`."""
    level = usual_level(rows)
    plain = [row for row in rows if not row.get("aware")]
    fitting = [row for row in plain if row.get("level") == level] or plain or list(rows)
    return threat_label(fitting[-1]) if fitting else None


def simplify(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Return a curve with fewer points that lies within a tolerance of the given one (Douglas and Peucker, 1973).

    Examples:
        >>> simplify([0.0, 0.1, 0.5, 1.0], [0.0, 0.9, 0.945, 1.0])
        [(0.0, 0.0), (0.1, 0.9), (1.0, 1.0)]
    """
    points = list(zip(x, y, strict=True))
    kept, spans = {0, len(points) - 1}, [(0, len(points) - 1)]
    while spans:
        first, last = spans.pop()
        far, distance = first, _TOLERANCE
        for number in range(first + 1, last):
            here = _distance(points[number], points[first], points[last])
            if here > distance:
                far, distance = number, here
        if far != first:
            kept.add(far)
            spans += [(first, far), (far, last)]
    return [points[number] for number in sorted(kept) if number >= 0 and points]


def _distance(point: tuple[float, float], start: tuple[float, float], end: tuple[float, float]) -> float:
    (px, py), (ax, ay), (bx, by) = point, start, end
    dx, dy = bx - ax, by - ay
    length = dx * dx + dy * dy
    share = 0.0 if length == 0 else min(1.0, max(0.0, ((px - ax) * dx + (py - ay) * dy) / length))
    return ((px - ax - share * dx) ** 2 + (py - ay - share * dy) ** 2) ** 0.5


def _statistics(rows: Sequence[Row], mode: Any) -> dict[str, Style]:
    names = distinct(rows, "statistic")
    return {name: Style(color=number, dash=number, mode=mode) for number, name in enumerate(names)}


def _known_statistic(part: Part) -> str | None:
    """Return the first statistic that an attack knew."""
    return next((row["statistic"] for row in part.rows if row.get("aware")), None)


def _facts(view: RunView, row: Row) -> dict[str, Any]:
    """Return what every row of a threat's plot states; the threat names its strength and what the attack knew."""
    plain = {name: row.get(name) for name in ("arm", "members", "images", "draws")}
    return {"run": view.name, **plain, "threat": threat_label(row)}
