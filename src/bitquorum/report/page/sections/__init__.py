"""The sections of the page, in their order."""

from collections.abc import Callable

from bitquorum.report.page.sections.certificates import certificates
from bitquorum.report.page.sections.detection import detection
from bitquorum.report.page.sections.frame import Page, Section
from bitquorum.report.page.sections.information import layers, pairs, plane
from bitquorum.report.page.sections.record import about, costs, examples, training
from bitquorum.report.page.sections.robustness import failures, ladder, security, summary

PLOTTED: tuple[Callable[[Page], Section], ...] = (
    summary,
    security,
    ladder,
    plane,
    pairs,
    training,
    detection,
    layers,
)
SECTIONS = (*PLOTTED[:3], certificates, *PLOTTED[3:7], examples, layers, costs, about)

__all__ = ["PLOTTED", "SECTIONS", "Page", "Section", "failures"]
