"""Keep a climb in a file, from which it goes on after an interrupt."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitquorum.evaluate.accuracy import Accuracy
from bitquorum.evaluate.ladder import Climb, Examples, Step
from bitquorum.files import load_tensors, save_tensors
from bitquorum.interface import Cost, DataError, Method
from bitquorum.registry import digest


def write_climb(path: Path, climb: Climb, examples: Examples, *, mark: str = "") -> None:
    """Store a climb: outcomes of each image, the worst version of each, and the steps so far.

    Args:
        path: Target file.
        climb: What is stored.
        examples: Images under attack, of which labels and identities are stored.
        mark: Of what is climbed; see `mark_of`.
    """
    tensors = {
        "images": climb.images,
        "rate": climb.rate,
        "second": climb.second,
        "standing": climb.standing.to(torch.uint8),
        "broken_by": climb.broken_by,
        "correct": climb.correct.to(torch.uint8),
        "claim": climb.claim.to(torch.uint8),
        "labels": examples.labels,
        "examples": examples.index,
    }
    steps = json.dumps([asdict(step) for step in climb.steps])
    save_tensors(
        path,
        {name: value.contiguous().cpu() for name, value in tensors.items()},
        {"epsilon": repr(climb.epsilon), "steps": steps} | ({"mark": mark} if mark else {}),
    )


def read_climb(path: Path, device: torch.device | str = "cpu", *, mark: str = "") -> tuple[Climb, Tensor]:
    """Return a stored climb, and the identities of its examples; a given mark must be that of the climb, if it has one.

    Raises:
        DataError: if the file is corrupt, or has another mark.
    """
    stored, facts = load_tensors(path)
    if mark and facts.get("mark", mark) != mark:
        raise DataError(
            f"expected the climb of this model on these images by this ladder at {path}, got that of another; choose "
            "another file, or remove it"
        )
    tensors = {name: value.to(device) for name, value in stored.items()}
    try:
        steps = [_step(row) for row in json.loads(facts["steps"])]
        flags: dict[str, Tensor] = {name: tensors[name].bool() for name in ("standing", "correct", "claim")}
        climb = Climb(
            epsilon=float(facts["epsilon"]),
            steps=steps,
            images=tensors["images"],
            rate=tensors["rate"],
            second=tensors.get("second", torch.full_like(tensors["rate"], -1)),  # of an earlier version
            broken_by=tensors["broken_by"],
            **flags,
        )
        return climb, tensors["examples"]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"expected the state of a ladder at {path}, got: {error}; remove it") from error


def mark_of(modules: Iterable[nn.Module], examples: Examples, method: Method) -> str:
    """Return what tells a climb from others: the modules, images, labels and the ladder, or another evaluation.

    Of a module parameters and buffers are seen, and the settings that its `repr` shows; its code is not.
    """
    seen = hashlib.sha256(digest(method).encode())
    modules = list(modules)
    for module in modules:
        seen.update(re.sub(r" at 0x[0-9a-f]+", "", repr(module)).encode())
    states = [module.state_dict() for module in modules]
    for state in ({"images": examples.images, "labels": examples.labels}, *states):
        for name, value in state.items():
            if isinstance(value, Tensor):
                seen.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                seen.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


def _step(row: dict[str, Any]) -> Step:
    accuracies = {name: row[name] and Accuracy(**row[name]) for name in ("alone", "left")}
    return Step(**{**row, **accuracies, "cost": Cost(**row["cost"])})
