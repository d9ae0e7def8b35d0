"""Lay the rows of a suite out: defences side by side, with what they cost."""

import csv
import io
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

from bitquorum.report.page.markup import Html, element, grid
from bitquorum.report.tables import Table, epsilon_label, points

_SHOWN: Final = ("defence", "members", "clean", "claim", "worst", "vs ref", "detect")
_COSTS: Final = ("KiB", "M MAC", "G bit-op", "train s", "ms/image", "failed checks")

_STYLE: Final = """
main { max-width: 110rem; margin: 0 auto; }
.bar { display: block; height: .3rem; margin-top: .2rem; border-radius: 2px; background: var(--accent); }
"""


def bench_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return one line for each defence: those trained without adversarial images first, the best worst case first."""
    most = max((len(row["seeds"]) for row in rows), default=0)
    body = [(*_accuracies(row, most), *_costs(row)) for row in _ordered(rows)]
    return Table(header=(*_SHOWN, *_COSTS), rows=tuple(body), note=_note(rows) if rows else "No rows yet.")


def bench_tables(rows: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """Return the same in two tables that fit a terminal: accuracies, then costs."""
    whole = bench_table(rows)
    parts = slice(len(_SHOWN)), slice(len(_SHOWN), None)
    costs = tuple((row[0], *row[parts[1]]) for row in whole.rows)
    return (
        Table(header=_SHOWN, rows=tuple(row[parts[0]] for row in whole.rows)),
        Table(header=("defence", *_COSTS), rows=costs, note=whole.note),
    )


def bench_files(rows: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    """Return the table of a suite as Markdown, CSV and one HTML file: contents by file name."""
    table = bench_table(rows)
    return {
        "table.md": f"{table.markdown()}\n\n{table.note}\n",
        "table.csv": bench_csv(rows),
        "table.html": _document(table, [row["worst"] for row in _ordered(rows)], name),
    }


def bench_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as CSV, one column for each number."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _ordered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (row["adversarial"], -row["worst"]["value"]))


def _accuracies(row: dict[str, Any], seeds: int) -> tuple[str, ...]:
    tpr = row["detector"]["tpr5"]
    done = len(row["seeds"])
    lacks = f" ({done} of {seeds} seeds)" if done < seeds else ""
    return (
        row["title"] + (" (AT)" if row["adversarial"] else "") + lacks,
        row["members"],
        *(_accuracy(row[name]) for name in ("clean", "claim", "worst")),
        "ref" if row["title"] == row["reference"] else points(row.get("difference")),
        "-" if tpr is None else f"{100 * tpr:.0f}",
    )


def _costs(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['bytes'] / 1024:.1f}",
        f"{row['macs'] / 1e6:.2f}",
        f"{row['bit_operations'] / 1e9:.3f}",
        "-" if row["train_seconds"] is None else f"{row['train_seconds']:.0f}",
        f"{row['milliseconds']:.2f}",
        ", ".join(row["failed_checks"]) or "none",
    )


def _accuracy(found: dict[str, Any]) -> str:
    return f"{100 * found['value']:.1f} [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"


def _note(rows: Sequence[dict[str, Any]]) -> str:
    first, reference = rows[0], rows[0]["reference"]
    seeds = sorted({len(row["seeds"]) for row in rows})
    places = " or ".join(dict.fromkeys(f"{row['device']}, {row['threads']} threads" for row in rows))
    compared = (
        f" Vs ref: worst case minus that of {reference}, paired by image and seed; * where p < 0.05 after "
        "Holm's correction."
        if reference
        else ""
    )
    return (
        f"Accuracy in % at {epsilon_label(first['epsilon'])} on {first['images']} test images, {first['draws']} fresh "
        f"draws and {' or '.join(map(str, seeds))} {'seed' if seeds == [1] else 'seeds'} of training, with 95 % "
        "intervals over images and seeds. "
        f"Claim: PGD through the quantizers alone. Worst: over the {first['ladder']} ladder.{compared} Detect: "
        "true positives in % at 5 % false positives among the worst images that fool, by attacks that do not know it. "
        "AT: adversarial images enter the training. KiB, MAC, bit-op: of one prediction, weights at their bits. "
        f"Times: on {places}; comparable within one machine alone."
    )


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}_")
        else:
            flat[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _document(table: Table, worst: Sequence[dict[str, Any]], name: str) -> str:
    """Return the table as one file without scripts; a bar under each worst case makes rows comparable at a glance."""
    style = resources.files("bitquorum.report.page").joinpath("page.css").read_text(encoding="utf-8")
    column, rows = table.header.index("worst"), []
    for row, found in zip(table.rows, worst, strict=True):
        bar = element("span", class_="bar", style=f"width: {100 * found['value']:.1f}%", aria_hidden="true")
        rows.append((*row[:column], Html(element("span", row[column]) + bar), *row[column + 1 :]))
    title = f"bitquorum bench: {name}"
    texts = (0, 1, len(table.header) - 1)
    body = element(
        "main",
        element("header", element("h1", title)),
        grid(table.header, rows, "Defences", texts=texts),
        element("p", table.note, class_="note"),
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Html(style + _STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', body), lang='en')}\n"
