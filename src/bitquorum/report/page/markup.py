"""Build HTML from plain values; text is escaped unless it is `Html` already."""

import html
from collections.abc import Collection, Iterable, Sequence

_VOID = ("meta", "img", "br")


class Html(str):
    """Mark text that is HTML already, so that it is not escaped again."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: str | bool | None) -> Html:
    """Return an element; children that are not `Html` and all attributes are escaped.

    In the name of an attribute `_` stands for `-`, and a last one is dropped. An attribute of `None` or `False` is left
    out, one of `True` has no value.

    Examples:
        >>> element("p", "a < b", element("b", "c"), class_="note", hidden=True)
        '<p class="note" hidden>a &lt; b<b>c</b></p>'
    """
    text = f"<{name}{_attributes(attributes)}>"
    return Html(text if name in _VOID else f"{text}{join(children)}</{name}>")


def join(children: Iterable[str | None]) -> Html:
    """Return children side by side as HTML; `None` is left out."""
    parts = (child if isinstance(child, Html) else html.escape(child) for child in children if child is not None)
    return Html("".join(parts))


def grid(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    *,
    texts: Collection[int] = (0,),
    long: Collection[int] = (),
    marked: Collection[int] = (),
) -> Html:
    """Return a table in a box that scrolls sideways, with the first cell of each row as its heading.

    Args:
        header: Column names.
        rows: Cells, text or `Html`.
        caption: What the table shows.
        texts: Columns that are set to the left; all others hold numbers and are set to the right.
        long: Of these, columns whose text may break into lines.
        marked: Rows that are highlighted.
    """
    left = {column: "text" if column in texts else None for column in range(len(header))}
    left |= {column: "text long" for column in long}
    head = (element("th", name, scope="col", class_=left[column]) for column, name in enumerate(header))
    body = []
    for number, row in enumerate(rows):
        cells = [
            element("td" if column else "th", cell, scope=None if column else "row", class_=left[column])
            for column, cell in enumerate(row)
        ]
        body.append(element("tr", *cells, class_="marked" if number in marked else None))
    table = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=str(caption))


def _attributes(attributes: dict[str, str | bool | None]) -> str:
    text = ""
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            text += f" {name}"
        elif isinstance(value, str):
            text += f' {name}="{html.escape(value)}"'
    return text
