"""Show what detectors tell apart, and what rejecting what they flag is worth."""

from bitquorum.files import extended
from bitquorum.report.detect import rate_columns
from bitquorum.report.page import detectors
from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.look import level_label, threat_label
from bitquorum.report.page.markup import Html, element, grid, join
from bitquorum.report.page.sections.frame import Page, Section, counts, folded, missing, note, number, share

_BOTH_WAYS = (
    "Right or rejected takes a rejection as a defence, accepted and right takes it as a failure; hollow: with attacks "
    "that know the detector."
)


def detection(page: Page) -> Section:
    """Return ROC curves, scores, rates, and accuracy with rejection."""
    return Section(
        name="detection",
        short="Detectors",
        title="Detectors",
        lead="Does a statistic of the members' predictions tell attacked images from clean ones? Positives are the "
        "attacked images that were right when clean and are wrong now. An AUROC of 0.5 is chance; TPR@5 is the share "
        "found at 5 % false positives, a dash where fewer than 10 images are positives. Of "
        "window-mi both sides are windows of all images, fooled or not. The number that counts is the one against an "
        "attack that knows the detector.",
        body=page.per_run(lambda view: _detection(page, view)),
    )


def _detection(page: Page, view: RunView) -> Html:
    if not view.detections:
        return missing(view, "detection", "bitquorum detect")
    return join(_part(page, view, part) for part in view.detections)


def _part(page: Page, view: RunView, part: Part) -> Html:
    found = select(part.rows, name="detection")
    calibration = " or ".join(map(str, sorted(distinct(part.rows, "calibration"))))
    text = f"{counts(part.rows)}" + (f"; thresholds from {calibration} held-out clean images." if calibration else ".")
    return join(
        [
            element("h4", f"Detection {part.digest}") if len(view.detections) > 1 else None,
            note(text),
            page.plot(detectors.areas(view, part), "Bars are 95 % intervals; the broken line is chance."),
            page.plot(detectors.roc(view, part), "The dotted diagonal is chance."),
            page.plot(detectors.scores(view, part), "The further the two lie apart, the better the statistic."),
            page.plot(detectors.rejection(view, part), _BOTH_WAYS),
            _rejection(part),
            *(_rates(part, arm, select(found, arm=arm)) for arm in distinct(found, "arm")),
            _thresholds(part),
        ]
    )


def _rates(part: Part, arm: str, rows: list[Row]) -> Html:
    """Return a line for each threat and statistic, with and without an attack that knows the detector."""
    rates = rate_columns([dict(row) for row in rows])
    header = ["threat", "statistic", "attack knows the detector", "positives", "AUROC"]
    header += [f"TPR@{rate.removeprefix('tpr')}, %" for rate in rates]
    body = [
        (
            threat_label(extended(row, aware=False)),
            row["statistic"],
            "yes" if row.get("aware") else "no",
            str(row.get("successes", "–")),
            number(row, "auroc"),
            *(share(row, rate) for rate in rates),
        )
        for row in rows
    ]
    table = grid(header, body, f"Detection on {arm}, with 95 % intervals", texts=(0, 1, 2))
    return folded(
        f"{arm}: AUROC and true-positive rates of every threat and statistic", table, note(f"{counts(rows)}.")
    )


def _rejection(part: Part) -> Html | None:
    """Return accuracy with rejection in the worst case at the first rate and one strength, and all else on demand."""
    rows = select(part.rows, name="rejection")
    hard = [row for row in rows if row["threat"] in detectors.WORST]
    if not hard:
        return _all_rejections(rows) if rows else None
    rate, level = hard[0]["false_positives"], detectors.usual_level(hard)
    names = tuple(detectors.COUNTS)
    header = ["ensemble", "statistic"]
    header += [f"{text}{known}" for known in detectors.WORST.values() for text in detectors.COUNTS.values()]
    body = []
    for arm, statistic in distinct([{"of": (row["arm"], row["statistic"])} for row in hard], "of"):
        found = select(hard, arm=arm, statistic=statistic, false_positives=rate, level=level)
        lines = [next(iter(select(found, threat=threat)), {}) for threat in detectors.WORST]
        body.append((arm, statistic, *(share(line, name) for line in lines for name in names)))
    where = f" at {level_label({'level': level})}" if level else ""
    caption = f"Worst case for each image{where} with rejection at {100 * rate:g} % false positives; %, 95 % intervals"
    text = f"{counts(select(hard, level=level))}; a dash: no attack that knows this detector was made."
    return join([grid(header, body, caption, texts=(0, 1)), note(text), _all_rejections(rows)])


def _all_rejections(rows: list[Row]) -> Html:
    """Return accuracy with rejection under every threat and at every rate."""
    header = ("ensemble", "statistic", "threat", "false positives", *detectors.COUNTS.values())
    body = [
        (
            row["arm"],
            row["statistic"],
            threat_label(extended(row, aware=False)),
            f"{100 * row['false_positives']:g} %",
            *(share(row, name) for name in detectors.COUNTS),
        )
        for row in rows
    ]
    table = grid(header, body, "Accuracy in % with rejection", texts=(0, 1, 2))
    return folded("Rejection at every threat and rate", table, note(f"{counts(rows)}."))


def _thresholds(part: Part) -> Html | None:
    rows = select(part.rows, name="clean")
    if not rows:
        return None
    header = ("ensemble", "statistic", "false positives", "threshold", "rejected, %", "accepted and right, %")
    body = [
        (
            row["arm"],
            row["statistic"],
            f"{100 * row['false_positives']:g} %",
            "–" if row.get("threshold") is None else f"{row['threshold']:.4g}",
            share(row, "rejected"),
            share(row, "accepted_right"),
        )
        for row in rows
    ]
    table = grid(header, body, "Thresholds, and what they do to clean test images", texts=(0, 1))
    return folded("Thresholds and clean images", table, note(f"{counts(rows)}."))
