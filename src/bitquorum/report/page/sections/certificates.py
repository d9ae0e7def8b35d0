"""Show the bracket of each ensemble: what is proven from below, and what attacks leave from above."""

from bitquorum.files import extended
from bitquorum.report.certify import certificate_table
from bitquorum.report.page.collect import Part, RunView
from bitquorum.report.page.markup import Html, element, grid, join
from bitquorum.report.page.sections.frame import Page, Section, missing, note


def certificates(page: Page) -> Section:
    """Return a table for each stored certification, with the attacks of equal radius beside it."""
    return Section(
        name="certificates",
        short="Certified floor",
        title="Between the certified floor and the attacked ceiling",
        lead="A certificate proves, image by image, that no perturbation of the radius changes a right answer: a "
        "floor. The strongest stored attacks are a ceiling. The robust accuracy lies between them, and a wide bracket "
        "says how little is known of it.",
        body=page.per_run(_certificates),
    )


def _certificates(view: RunView) -> Html:
    if not view.certificates:
        return missing(view, "certificate", "bitquorum certify")
    return join(_part(view, part) for part in view.certificates)


def _part(view: RunView, part: Part) -> Html:
    table = certificate_table([dict(row) for row in part.rows], _ceilings(view))
    title = element("h4", f"Certification {part.digest}") if len(view.certificates) > 1 else None
    caption = "Accuracy in %, with 95 % intervals"
    return join([title, grid(table.header, table.rows, caption, texts=(0, 1)), note(table.note)])


def _ceilings(view: RunView) -> list[dict[str, object]]:
    """Return the rows of attacks with whose they are: of ladders, then of evaluations."""
    named = [(f"ladder {part.config['name']}", part) for part in view.ladders]
    named += [("evaluation", part) for part in view.evaluations]
    return [extended(row, ceiling=name) for name, part in named for row in part.rows]
