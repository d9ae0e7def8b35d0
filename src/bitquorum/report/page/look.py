"""Give each ensemble of a page one colour, dash and marker, the same in all its plots."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bitquorum.report.page.collect import Row, RunView
from bitquorum.report.page.figures import Axis, Key, Series, Style
from bitquorum.report.tables import epsilon_label

SHARE = Axis(title="expected accuracy", percent=True, low=-0.02, high=1.02)


@dataclass(frozen=True, kw_only=True)
class Look:
    """Number the arms of a page."""

    arms: tuple[str, ...]

    @classmethod
    def of(cls, views: Sequence[RunView]) -> "Look":
        """Return the look of a page: arms of the same name look the same in every run."""
        arms = dict.fromkeys(arm for view in views for arm in view.arms)
        return cls(arms=tuple(arms))

    def arm(self, name: str) -> Style:
        """Return the style of an arm."""
        return numbered(self.arms.index(name) if name in self.arms else len(self.arms))


def numbered(number: int) -> Style:
    """Return the style of the series of this number: colour, dash and marker differ from those of its neighbours."""
    return Style(color=number, dash=number, marker=number)


def legend(styles: dict[str, Style]) -> tuple[dict[str, Series], tuple[Key, ...]]:
    """Return series that each have a key of their own, and these keys."""
    series = {name: Series(style=style, keys=(name,)) for name, style in styles.items()}
    return series, tuple(Key(name=name, style=style) for name, style in styles.items())


def banded(style: Style) -> Style:
    """Return the style with intervals as a band."""
    return replace(style, band=True)


def level_label(row: Row) -> str:
    """Return the strength of a threat: epsilon in the field's notation, or a severity; empty for clean images.

    Examples:
        >>> level_label({"axis": "severity", "level": 3.0}), level_label({"axis": "epsilon", "level": 8 / 255})
        ('severity 3', '8/255')
    """
    level = row.get("level") or 0.0
    if not level:
        return ""
    return f"severity {level:g}" if row.get("axis") == "severity" else epsilon_label(level)


def threat_label(row: Row) -> str:
    """Return a threat with its strength, and whether the attack knew the detector."""
    knows = ", knows the detector" if row.get("aware") else ""
    return " ".join(part for part in (str(row.get("threat")), level_label(row)) if part) + knows


def radius_axis() -> Axis:
    """Return the axis of epsilon, in the maximum norm."""
    return Axis(title="epsilon, in 1/255", low=0.0)


def radius(epsilon: float) -> float:
    """Return epsilon in the unit of `radius_axis`."""
    return 255 * epsilon
