"""Show what members share: the plane, the pairs, and noise and rate of each layer."""

from bitquorum.report.page import planes
from bitquorum.report.page.collect import Part, RunView, distinct
from bitquorum.report.page.look import level_label
from bitquorum.report.page.markup import Html, element, grid, join
from bitquorum.report.page.sections.frame import (
    Page,
    Section,
    counts,
    folded,
    listing,
    missing,
    note,
    number,
    share,
)


def plane(page: Page) -> Section:
    """Return the adversarial information plane of all runs, and its correlations."""
    return Section(
        name="plane",
        short="Plane",
        title="The adversarial information plane",
        lead="Each line follows one ensemble from clean images into one threat, point by point as the threat grows; "
        "across lies the information in bits that two members' predictions share, upwards the ensemble's accuracy. "
        "High and right: clean; low and right: one attack fools all members alike; high and left: members that differ "
        "and are right together; low and left: collapse. The information falls with accuracy even where members err "
        "independently, so compare with the reference, or choose the residual above it; nothing here shows that "
        "shared information causes robustness.",
        body=join([_overlay(page), page.per_run(_plane)]),
    )


def pairs(page: Page) -> Section:
    """Return the matrices of pairwise MI."""
    return Section(
        name="pairs",
        short="Pairs",
        title="What each pair of members shares",
        lead="Mutual information in bits between the predictions of each two members; on the diagonal a member's own "
        "entropy, the most that it can share. Equal light squares mean that a second member tells nothing new.",
        body=page.per_run(lambda view: _pairs(page, view)),
    )


def layers(page: Page) -> Section:
    """Return noise and rate of each quantizer."""
    return Section(
        name="layers",
        short="Layers",
        title="Noise and rate in each layer",
        lead="For each quantizer of each member: the noise, H(Q(x) | x), bits of randomness that it adds to a value, "
        "and the rate, I(x; Q(x)), bits that it lets through. The attacker must average over the noise; the network "
        "lives on the rate.",
        body=page.per_run(lambda view: _layers(page, view)),
    )


def _overlay(page: Page) -> Html | None:
    figure = planes.plane(page.views, page.look)
    label = planes.label_plane(page.views, page.look)
    parts = [part for view in page.views for part in view.planes]
    rows = [row for part in parts for row in part.rows]
    text = (
        f"{counts(rows)}; bars are 95 % intervals, discs clean images. Reference: members of equal accuracy r that "
        "err independently, drawn as (I(r), r), as if the ensemble were as accurate as each member."
    )
    return join([page.plot(figure, text), page.plot(label, f"{counts(rows)}. Reference as above.")])


def _plane(view: RunView) -> Html:
    if not view.planes:
        return missing(view, "plane", "bitquorum plane")
    return join(_plane_tables(view, part) for part in view.planes)


def _plane_tables(view: RunView, part: Part) -> Html:
    alone = [arm for arm in part.arms() if all(row.get("pair_mi") is None for row in part.rows if row["arm"] == arm)]
    body = [
        (
            row["arm"],
            row["threat"],
            level_label(row) or "–",
            share(row, "accuracy"),
            number(row, "pair_mi"),
            number(row, "reference_mi"),
            number(row, "residual"),
            number(row, "excess"),
            number(row, "conditional_mi"),
            number(row, "label_mi"),
        )
        for row in part.rows
    ]
    header = (
        "ensemble",
        "threat",
        "level",
        "accuracy, %",
        "pair MI",
        "reference",
        "residual",
        "excess",
        "conditional MI",
        "label MI",
    )
    values = grid(header, body, f"Plane {part.digest}: MI in bits with 95 % intervals", texts=(0, 1, 2))
    text = f"Single members share nothing, so {listing(alone)} only appears in the label plot." if alone else None
    return join(
        [
            element("h4", f"Plane {part.digest}") if len(view.planes) > 1 else None,
            note(text) if text else None,
            _correlations(part),
            folded(f"All {len(body)} points as a table", values, note(f"{counts(part.rows)}.")),
        ]
    )


def _correlations(part: Part) -> Html | None:
    """Return how information and accuracy go together, pooled at once and for each threat on demand."""
    rows = part.sheet("correlations")
    if not rows:
        return None
    header = ("ensemble", "threat", "information", "points", "Pearson", "Spearman", "p")
    lines = {
        True: [row for row in rows if row.get("threat") == "pooled"],
        False: [row for row in rows if row.get("threat") != "pooled"],
    }
    tables = {}
    for pooled, found in lines.items():
        body = [
            (
                row["arm"],
                row["threat"],
                row["quantity"],
                str(row["points"]),
                number(row, "pearson"),
                number(row, "spearman"),
                _p_value(row),
            )
            for row in found
        ]
        caption = f"Correlation of accuracy with information, {'pooled over threats' if pooled else 'threat by threat'}"
        tables[pooled] = grid(header, body, caption, texts=(0, 1, 2)) if body else None
    text = "p: two-sided permutation test of Pearson's correlation; exact where all permutations were counted."
    single = folded("Threat by threat", tables[False]) if tables[False] else None
    return join([tables[True], note(text), single])


def _p_value(row: planes.Row) -> str:
    if row.get("p_value") is None:
        return "–"
    return f"{row['p_value']:.2g}{' (exact)' if row.get('exact') else ''}"


def _pairs(page: Page, view: RunView) -> Html:
    plots = [page.plot(planes.matrices(view, part), f"{counts(part.rows)}.") for part in view.planes]
    if any(plots):
        return join(plots)
    if view.planes:
        return element("p", "No ensemble of this run has two members.", class_="missing")
    return missing(view, "plane", "bitquorum plane")


def _layers(page: Page, view: RunView) -> Html:
    plots = []
    for part in view.planes:
        images = distinct(part.sheet("layers"), "images")
        text = f"Measured on {' or '.join(map(str, images))} images." if images else None
        plots.append(page.plot(planes.layers(view, part), text))
    if any(plots):
        return join(plots)
    if view.planes:
        return element("p", "No ensemble of this run has a quantizer.", class_="missing")
    return missing(view, "plane", "bitquorum plane")
