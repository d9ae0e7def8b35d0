"""Read example images of a run's plane, magnify what a threat did to them, and count the members' votes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquorum.data.sources import SOURCES
from bitquorum.files import load_tensors
from bitquorum.interface import DataError
from bitquorum.report.page.collect import Part, Row, RunView, distinct, select
from bitquorum.report.page.look import threat_label

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6
_PREFERRED = ("ladder", "white-box", "gradient-free", "transfer", "corruption", "noise")

Votes = tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Example:
    """Hold one image, what became of it, and how the members vote.

    Attributes:
        label: Name of the right class.
        clean: The image as the address of a PNG.
        attacked: The image under threat.
        difference: Their difference, magnified around grey.
        votes: Of each member on the clean image: classes and their share of the draws, most first.
        attacked_votes: On the image under threat.
    """

    label: str
    clean: str
    attacked: str
    difference: str
    votes: tuple[Votes, ...]
    attacked_votes: tuple[Votes, ...]


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """Hold an arm's examples under one threat, with the factor of their differences and the number of draws."""

    arm: str
    threat: str
    factor: int
    draws: int
    largest: float
    examples: tuple[Example, ...]


def example_sets(view: RunView, part: Part) -> list[ExampleSet]:
    """Return examples of each arm under the same threat: the ladder's worst case or an attack of middle strength.

    They are the first images of the test set's order; nothing chose them. An arm without tensors is left out.

    Raises:
        DataError: if a file does not hold what it should.
    """
    names = _class_names(view)
    found = []
    for arm in part.arms():
        row = _strongest(part, arm)
        clean = part.folder / arm / "clean@0.000000.safetensors"
        attacked = _file(part.folder / arm, row) if row else None
        if row and attacked and clean.is_file() and attacked.is_file():
            found.append(_examples(arm, row, clean, attacked, names))
    return found


def _strongest(part: Part, arm: str) -> Row | None:
    """Return the row whose threat is shown: the first kind that is there, at the middle one of its strengths."""
    rows = select(part.rows, arm=arm)
    for kind in _PREFERRED:
        if here := select(rows, kind=kind):
            levels = sorted(distinct(here, "level"))
            return select(here, level=levels[len(levels) // 2])[-1]
    return None


def _file(folder: Path, row: Row) -> Path | None:
    """Return the file of a threat, whose name may hold another spelling of it than the row."""
    ending = f"@{row['level']:.6f}.safetensors"
    exact = folder / f"{row['threat']}{ending}"
    if exact.is_file():
        return exact
    for path in sorted(folder.glob(f"*{ending}")):
        if load_tensors(path)[1].get("threat") == row["threat"]:
            return path
    return None


def _examples(arm: str, row: Row, clean: Path, attacked: Path, names: Sequence[str]) -> ExampleSet:
    before, after = load_tensors(clean)[0], load_tensors(attacked)[0]
    try:
        images, changed = before["images"][:_SHOWN].float(), after["images"][:_SHOWN].float()
        votes, attacked_votes = _votes(before["logits"], names), _votes(after["logits"], names)
        labels = [_name(names, int(label)) for label in before["labels"][:_SHOWN]]
        delta = changed - images
    except (KeyError, RuntimeError, IndexError) as error:
        raise DataError(f"expected images, labels and logits in {clean} and {attacked}, got: {error}") from error
    largest = float(delta.abs().max()) if delta.numel() else 0.0
    factor = max(1, int(0.5 / largest)) if largest > 0 else 1
    shown = (0.5 + factor * delta).clamp(0, 1)
    examples = [
        Example(
            label=labels[number],
            clean=_png(images[number]),
            attacked=_png(changed[number]),
            difference=_png(shown[number]),
            votes=votes[number],
            attacked_votes=attacked_votes[number],
        )
        for number in range(len(images))
    ]
    return ExampleSet(
        arm=arm,
        threat=threat_label(row),
        factor=factor,
        draws=int(before["logits"].shape[0]),
        largest=largest,
        examples=tuple(examples),
    )


def _votes(logits: "Tensor", names: Sequence[str]) -> list[tuple[Votes, ...]]:
    """Return for each of the first images the votes of each member; logits are [draws, members, images, classes]."""
    shown = logits[:, :, :_SHOWN]
    chosen = shown.argmax(-1).masked_fill(~shown.amax(-1).isfinite(), -1)
    return [
        tuple(_shares(chosen[:, member, image].tolist(), names) for member in range(chosen.shape[1]))
        for image in range(chosen.shape[2])
    ]


def _shares(classes: list[int], names: Sequence[str]) -> Votes:
    """Return the share of each class, most first; -1 is no answer.

    Examples:
        >>> _shares([3, 1, 3, 3], ())
        (('3', 0.75), ('1', 0.25))
    """
    counts = sorted((-classes.count(number), number) for number in set(classes))
    return tuple((_name(names, number), -count / len(classes)) for count, number in counts)


def _png(image: "Tensor") -> str:
    """Return an image [C, H, W] in [0, 1] as the address of a PNG; of other than three channels the first."""
    from PIL import Image

    scaled = (image.clamp(0, 1) * 255).round().byte()
    pixels: Any = scaled.permute(1, 2, 0).contiguous().numpy() if scaled.shape[0] == 3 else scaled[0].numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _class_names(view: RunView) -> tuple[str, ...]:
    """Return the names of the classes of a published data set; none for others, whose classes are numbers."""
    choice = view.config.get("data")
    source = SOURCES.get(str(choice.get("name", ""))) if isinstance(choice, dict) else None
    return source.classes if source else ()


def _name(names: Sequence[str], number: int) -> str:
    if number < 0:
        return "no answer"
    return names[number] if number < len(names) else str(number)
