"""Show what attacks leave: the summary, security curves, the ladder and its verdicts."""

from collections.abc import Sequence
from itertools import pairwise

from bitquorum.report.compare import difference_table
from bitquorum.report.ladder import rungs
from bitquorum.report.page import curves
from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.markup import Html, element, grid, join
from bitquorum.report.page.sections.frame import Page, Section, counts, folded, listing, missing, note, pair, verdict
from bitquorum.report.tables import Table, comparison, epsilon_label, percent


def summary(page: Page) -> Section:
    """Return one line for each ensemble of each run."""
    return Section(
        name="summary",
        short="Summary",
        title="Summary",
        lead="One line for each ensemble: the expected accuracy in %, that is the mean over fresh draws of the noise, "
        "which no attack saw. Brackets are 95 % intervals over images and draws. Read the worst case, not the clean "
        "column, and first of all whether the self-checks passed: a failed one means that the attack may be weak.",
        body=page.per_run(_summary),
    )


def failures(views: Sequence[RunView]) -> Html:
    """Return what the top of the page says of the self-checks: each failed one with its reason."""
    rows = [(view, row) for view in views for part in view.ladders for row in part.sheet("verdicts")]
    failed = [(view, row) for view, row in rows if row["passed"] is False]
    if not rows:
        text = "No self-checks are stored: nothing here has been tested for attacks that are too weak."
        return element("p", text, class_="banner neutral")
    if not failed:
        posed = sum(bool(row["passed"]) for _, row in rows)
        text = f"{posed} stored self-checks passed"
        text = f"All {text}." if posed == len(rows) else f"{text}, {len(rows) - posed} could not be posed."
        return element("p", f"✓ {text}", class_="banner good")
    lines = (
        element(
            "li",
            element("strong", f"{row['name']}"),
            f" – {row['arm']} at {epsilon_label(row['epsilon'], row.get('norm'))}, {view.name}: {row['reason']}",
        )
        for view, row in failed
    )
    return element(
        "div",
        element(
            "p",
            element("strong", f"✗ {len(failed)} of {len(rows)} self-checks FAILED."),
            " The attack may be weaker than it looks; do not quote these accuracies before the reason is found.",
        ),
        element("ul", *lines),
        class_="banner bad",
        role="alert",
    )


def security(page: Page) -> Section:
    """Return the security curves of every evaluation, with the ladders' points."""
    return Section(
        name="security",
        short="Security curves",
        title="Security curves",
        lead="Expected accuracy against the radius of the attack in the maximum norm, with 95 % intervals. A curve "
        "that does not reach zero at a large radius, or lies higher for a stronger attack, would be a sign of a weak "
        "attack. Worst: for each image the attack that leaves it least. Hollow markers are worst cases over the "
        "ladder.",
        body=page.per_run(lambda view: _security(page, view)),
    )


def ladder(page: Page) -> Section:
    """Return bracket, descent, rungs and verdicts of every ladder."""
    return Section(
        name="ladder",
        short="Ladder",
        title="The ladder and its self-checks",
        lead="A ladder climbs from the claim as worded (projected gradient descent through the quantizer) over "
        "stronger and different attacks to the worst case. The breaking rung, marked in the tables, is the one after "
        "the clean images that took most from the accuracy. A gap between claim and worst case is what the claim hid.",
        body=page.per_run(lambda view: _ladders(page, view)),
    )


def breaking_rung(steps: Sequence[Row]) -> int | None:
    """Return the place of the rung that took most from the accuracy; among equals the one that broke most.

    Examples:
        >>> breaking_rung([{"value": 0.9}, {"value": 0.5, "broke": 4}, {"value": 0.4, "broke": 9}])
        1
    """
    taken = [
        (before["value"] - after["value"], after.get("broke") or 0, -place)
        for place, (before, after) in enumerate(pairwise(steps), start=1)
    ]
    best = max(taken, default=(0.0, 0, 0))
    return -best[2] if best[0] > 0 else None


def _summary(view: RunView) -> Html:
    evaluation = view.evaluations[0] if view.evaluations else None
    climbed = view.ladders[0] if view.ladders else None
    rows = [*(evaluation.rows if evaluation else ()), *(climbed.rows if climbed else ())]
    if not rows:
        return missing(view, "evaluation", "bitquorum evaluate")
    grid_radii = sorted(radius for radius in distinct(evaluation.rows, "epsilon") if radius) if evaluation else []
    ladder_radii = sorted(radius for radius in distinct(climbed.rows, "epsilon") if radius) if climbed else []
    header = ["ensemble", "members", "parameters", "clean"]
    header += [f"worst of the grid at {epsilon_label(radius)}" for radius in grid_radii]
    for radius in ladder_radii:
        at = epsilon_label(radius, climbed.config.get("norm") if climbed else None)
        header += [f"{kind} at {at}" for kind in ("ladder: claim", "ladder: worst")]
    header += ["self-checks"] if climbed else []
    body = []
    for arm in view.arms:
        cells: list[str] = [arm, view.members(arm) or "–", _parameters(view, arm), _accuracy(_clean(rows, arm))]
        cells += [_accuracy(_found(evaluation, arm, radius, "worst")) for radius in grid_radii]
        for radius in ladder_radii:
            cells += [_accuracy(_found(climbed, arm, radius, kind)) for kind in ("claim: ", "worst")]
        body.append([*cells, *([_checks(view, arm)] if climbed else [])])
    data = view.config.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    about = f"{view.name}: {name}" if name else view.name
    parts = []
    if evaluation:
        parts.append(f"Grid: evaluation {evaluation.digest}, {counts(evaluation.rows)}.")
    if climbed:
        parts.append(f"Ladder {climbed.label}: {counts(climbed.rows)}.")
    several = len(view.evaluations) > 1 or len(view.ladders) > 1
    parts += ["The first of each is shown here, all of them below; self-checks are of all."] if several else []
    shown = grid(header, body, about, texts=(0, 1, *([len(header) - 1] if climbed else [])))
    return join([shown, note(" ".join(parts)), *_differences(view)])


def _differences(view: RunView) -> list[Html]:
    """Return the paired differences between ensembles, where `bitquorum compare` has stored some."""
    shown = []
    parts = [("evaluation", part) for part in view.evaluations] + [("ladder", part) for part in view.ladders]
    for kind, part in parts:
        if rows := part.sheet("differences"):
            table = difference_table(rows)
            title = f"Differences between ensembles, {kind} {part.label}, paired by image"
            shown.append(folded(title, grid(table.header, table.rows, title, texts=(0, 1)), note(table.note)))
    return shown


def _clean(rows: Sequence[Row], arm: str) -> Row | None:
    return next((row for row in rows if row["arm"] == arm and row["attack"] == "clean"), None)


def _found(part: Part | None, arm: str, radius: float, attack: str) -> Row | None:
    """Return an arm's accuracy under the attack whose name begins so."""
    rows = select(part.rows, arm=arm, epsilon=radius, name="accuracy") if part else []
    return next((row for row in rows if row["attack"].startswith(attack)), None)


def _accuracy(row: Row | None) -> str:
    return percent(row) if row else "–"


def _parameters(view: RunView, arm: str) -> str:
    found = [row["parameters"] for row in view.rows() if row.get("arm") == arm and row.get("parameters")]
    return f"{found[0]:,}" if found else "–"


def _checks(view: RunView, arm: str) -> str:
    rows = [row for part in view.ladders for row in select(part.sheet("verdicts"), arm=arm)]
    if not rows:
        return "–"
    failed = distinct([row for row in rows if row["passed"] is False], "name")
    if not failed:
        posed = sum(bool(row["passed"]) for row in rows)
        unposed = f", {len(rows) - posed} not posed" if posed < len(rows) else ""
        return element("span", f"✓ {posed} passed{unposed}", class_="passed")
    return element("span", f"✗ FAILED: {', '.join(failed)}", class_="failed")


def _security(page: Page, view: RunView) -> Html:
    if not view.evaluations and not view.ladders:
        return missing(view, "evaluation", "bitquorum evaluate")
    blocks: list[Html | None] = [] if view.evaluations else [missing(view, "grid of attacks", "bitquorum evaluate")]
    for number, part in enumerate(view.evaluations or (None,)):
        ladders = view.ladders if number == 0 else ()
        answers = curves.answers_of(part, ladders)
        if not answers:
            continue
        name = part.digest if part else "ladder"
        if len(view.evaluations) > 1:
            blocks.append(element("h4", f"Evaluation {name}"))
        blocks.append(
            pair(
                page.plot(curves.security(view, answers, page.look, name), f"{counts(answers)}."),
                page.plot(curves.security_by_arm(view, answers, name), f"{counts(answers)}."),
            )
        )
        if part:
            blocks.append(folded("The same as a table", _table(comparison([dict(row) for row in part.rows]))))
    return join(blocks)


def _ladders(page: Page, view: RunView) -> Html:
    if not view.ladders:
        return missing(view, "ladder", "bitquorum evaluate --ladder standard")
    return join(_ladder(page, view, part) for part in view.ladders)


def _ladder(page: Page, view: RunView, part: Part) -> Html:
    absent = [arm for arm in view.arms if arm not in part.arms()]
    text = f"{counts(part.rows)}; norm {part.config.get('norm', 'linf')}."
    text += f" Not climbed to the end: {listing(absent)}." if absent else ""
    climbs = distinct([{"climb": (row["arm"], row["epsilon"])} for row in select(part.rows, name="left")], "climb")
    return join(
        [
            element("h4", f"Ladder {part.label}"),
            note(text),
            _outcomes(view, part, climbs),
            pair(
                page.plot(
                    curves.bracket_plot(view, part), "Clean, claim, worst case and second opinions; 95 % intervals."
                ),
                page.plot(curves.descent(view, part, page.look), "Each step is a rung; 95 % intervals as bands."),
            ),
            _verdicts(part),
            *(_rungs(part, arm, epsilon) for arm, epsilon in climbs),
        ]
    )


def _outcomes(view: RunView, part: Part, climbs: Sequence[tuple[str, float]]) -> Html:
    tries = next((str(row["name"]) for row in part.rows if str(row["name"]).startswith("worst of ")), "worst of tries")
    header = ("ensemble", "epsilon", "breaking rung", "it took", "it broke", "clean", "claim", "worst case", tries)
    body = []
    for arm, epsilon in climbs:
        steps = select(part.rows, arm=arm, epsilon=epsilon, name="left")
        place = breaking_rung(steps)
        broken = ("none", "–", "–")
        if place is not None:
            points = 100 * (steps[place - 1]["value"] - steps[place]["value"])
            broken = (steps[place]["attack"], f"{points:.1f} points", f"{steps[place].get('broke', 0)} images")
        tried = next(iter(select(part.rows, arm=arm, epsilon=epsilon, name=tries)), None)
        found = (
            _clean(part.rows, arm),
            _found(part, arm, epsilon, "claim: "),
            _found(part, arm, epsilon, "worst"),
            tried,
        )
        body.append((arm, epsilon_label(epsilon, part.config.get("norm")), *broken, *(percent(row) for row in found)))
    caption = f"Where the ensembles broke, ladder {part.label}, {view.name}; accuracy in % with 95 % intervals"
    return grid(header, body, caption, texts=(0, 1, 2))


def _rungs(part: Part, arm: str, epsilon: float) -> Html:
    rows = [dict(row) for row in part.rows]
    steps = select(part.rows, arm=arm, epsilon=epsilon, name="left")
    table = rungs(rows, arm, epsilon)
    seconds = select(part.sheet("seconds"), arm=arm, epsilon=epsilon)
    timed = {row["rung"]: row["seconds"] for row in seconds if "rung" in row}  # others are of peers
    cells = [(*line, f"{timed[line[0]]:,.1f}" if line[0] in timed else "–") for line in table.rows]
    place = breaking_rung(steps)
    if place is not None:
        first, *rest = cells[place]
        cells[place] = (join([element("mark", "breaking rung"), " ", first]), *rest)
    radius = epsilon_label(epsilon, part.config.get("norm"))
    caption = f"Rungs on {arm} at {radius}"
    marked = () if place is None else (place,)
    shown = grid((*table.header, "seconds"), cells, caption, texts=(0, 1), marked=marked)
    before, after = percent(steps[0]), percent(steps[-1])
    return folded(f"{arm} at {radius}, rung by rung: {before} → {after} %", shown, note(table.note))


def _verdicts(part: Part) -> Html | None:
    """Return the verdicts as a matrix, and the reasons below."""
    rows = part.sheet("verdicts")
    if not rows:
        return note("No self-checks are stored for this ladder.")
    columns = distinct([{"at": (row["arm"], row["epsilon"])} for row in rows], "at")
    found = {(row["name"], row["arm"], row["epsilon"]): row for row in rows}
    several = len({epsilon for _, epsilon in columns}) > 1
    norm = part.config.get("norm")
    header = ("self-check", *(f"{arm} at {epsilon_label(at, norm)}" if several else arm for arm, at in columns))
    body = [
        (name, *(verdict(found[name, *at]["passed"]) if (name, *at) in found else "–" for at in columns))
        for name in distinct(rows, "name")
    ]
    texts = range(len(header))
    reasons = [
        (row["arm"], epsilon_label(row["epsilon"], norm), row["name"], verdict(row["passed"]), row["reason"])
        for row in sorted(rows, key=lambda row: bool(row["passed"]))
    ]
    long = grid(
        ("ensemble", "epsilon", "self-check", "verdict", "reason"), reasons, "Reasons", texts=range(4), long=(4,)
    )
    matrix = grid(header, body, "Verdicts of the self-checks; a dash: the check does not apply", texts=texts)
    return join([matrix, folded("Reasons of the verdicts", long)])


def _table(table: Table) -> Html:
    rows = [[cell.replace(", ", ",\u00a0") for cell in row] for row in table.rows]
    return join([grid(table.header, rows, "Accuracy in % with 95 % intervals", texts=(0, 1)), note(table.note)])
