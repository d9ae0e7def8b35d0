"""Compose methods into one frozen experiment, and read it from a preset or a TOML file."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, final

from bitquorum import dorefa, randomized  # noqa: F401  # so that files can name their types
from bitquorum.conversion import Conversion, Policy
from bitquorum.ensemble import Aggregation, MeanProbability
from bitquorum.evaluate import Evaluation
from bitquorum.interface import ConfigError, InputError, Method
from bitquorum.objective import Objective
from bitquorum.registry import apply_overrides, decode, nearest
from bitquorum.train import Trainer
from bitquorum.zoo import DigitsNet, Network

_ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it names a folder


@final
@dataclass(frozen=True, kw_only=True)
class DataChoice(Method):
    """Choose the images.

    Attributes:
        name: As `data.load` takes it.
        train: Number of training images, balanced over classes; 0 for all.
        normalize: Whether networks shift and scale images by the training set's mean and deviation.
    """

    name: str = "digits"
    train: int = 0
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.train < 0:
            raise InputError(f"expected a number of training images of at least 0, got {self.train}")


@final
@dataclass(frozen=True, kw_only=True)
class Arm(Method):
    """Describe one of the ensembles that an experiment compares.

    Attributes:
        name: Name of its row and folder.
        network: Architecture of every member.
        members: What is made of each member's network: a `Policy`, or another conversion that its type names; a policy
            without bits leaves it in full precision.
        shared: Whether all members train one set of full-precision weights.
        aggregation: How a prediction is made.
        passes: Draws that one prediction averages over.
        objective: Training loss.
        trainer: In place of the experiment's.
        start: Name of an arm before this one, of the same networks and precisions: this one begins from its trained
            weights and ranges, on images in another order, in place of new weights and calibrated ranges. With a
            trainer of no epochs it keeps them.
        mirrored: Whether members also see each image mirrored, after the training; see `Ensemble`.
        shift: Pixels by which members also see each of these moved, after the training; `None` for none.
    """

    name: str
    network: Network = field(default_factory=DigitsNet)
    members: tuple[Policy | Conversion, ...] = (Policy(weight_bits=None, activation_bits=None),)
    shared: bool = False
    aggregation: Aggregation = field(default_factory=MeanProbability)
    passes: int = 1
    objective: Objective = field(default_factory=Objective)
    trainer: Trainer | None = None
    start: str | None = None
    mirrored: bool | None = None
    shift: int | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise InputError(f"expected at least one member in arm {self.name!r}, got none")
        if self.passes < 1:
            raise InputError(f"expected at least one pass per prediction, got {self.passes}")
        if self.shift is not None and self.shift < 1:
            raise InputError(f"expected a shift of at least one pixel, or none, got {self.shift}")
        if not _ARM.fullmatch(self.name):
            raise InputError(
                "expected an arm name of letters, digits, '-', '_' and '.' that begins with a letter or digit, got "
                f"{self.name!r}; rename it"
            )

    @property
    def precision(self) -> str:
        """The members' precisions in short, such as `w4a4 w3a3 fp`, and which further images they see."""
        looks = [name for name, on in (("mirrored", self.mirrored), ("shifted", self.shift)) if on]
        return " ".join([*self._labels, *looks])

    def fits(self, other: "Arm") -> bool:
        """Return whether the weights of another arm can be this one's."""
        mine, others = ((arm.network, arm._labels, arm.shared) for arm in (self, other))
        return mine == others

    @property
    def _labels(self) -> list[str]:
        return [policy.label for policy in self.members]


@final
@dataclass(frozen=True, kw_only=True)
class Experiment(Method):
    """Describe everything that decides a result: what is trained, on what, how, and how it is attacked.

    Attributes:
        name: Name of the run's folder, before the digest.
        seed: Of initial weights, data order, augmentation and noise; equal for all arms.
        kernels: `eager`, or `compiled` where a C++ compiler is at hand: faster steps after a slow start.
        data: Images.
        trainer: Of every arm without its own.
        evaluation: Attacks on every arm.
        arms: At least one, with different names.
    """

    name: str
    seed: int = 0
    kernels: Literal["eager", "compiled"] = "eager"
    data: DataChoice = field(default_factory=DataChoice)
    trainer: Trainer = field(default_factory=Trainer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    arms: tuple[Arm, ...] = (Arm(name="vanilla"),)

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) != len(names):
            raise InputError(f"expected at least one arm and different names, got {names}")
        for place, arm in enumerate(self.arms):
            fitting = [other.name for other in self.arms[:place] if arm.fits(other)]
            if arm.start is not None and arm.start not in fitting:
                raise InputError(
                    f"expected as start of arm {arm.name!r} an arm before it with its network, precisions and shared "
                    f"weights ({', '.join(fitting) or 'there is none'}), got {arm.start!r}"
                )
            if arm.start is None and (arm.trainer or self.trainer).epochs == 0:
                raise InputError(
                    f"expected at least one epoch of training in arm {arm.name!r}, got 0; without one it needs a start"
                )


def presets(kind: str = "preset") -> dict[str, str]:
    """Return the text of every preset by name, or of every suite."""
    folder = resources.files("bitquorum") / f"{kind}s"
    return {
        file.name.removesuffix(".toml"): file.read_text(encoding="utf-8")
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    }


def read(source: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment of a preset's name or a TOML file's path, with dotted overrides.

    Raises:
        ConfigError: if there is no such preset or file, the file is no TOML, or a key or value is not understood.

    Examples:
        >>> read("digits", ["trainer.epochs=3"]).trainer.epochs
        3
    """
    return parse(table_of(source), overrides)


def table_of(source: str | Path, kind: str = "preset") -> dict[str, Any]:
    """Return the table of a preset's name or a TOML file's path.

    Raises:
        ConfigError: if there is no such preset or file, or the file is no TOML.
    """
    source, path = str(source), Path(source)
    if path.suffix == ".toml" or "/" in source:
        if not path.is_file():
            raise ConfigError(f"expected a TOML file at {path}, got none; check the path")
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    else:
        known = presets(kind)
        if source not in known:
            advice = nearest(source, known).replace("one of these", f"among {', '.join(known)}")
            raise ConfigError(f"expected a {kind} or a path that ends in .toml, got {source!r}; {advice}")
        text = known[source]
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"expected TOML in {source}, got: {error}; mend that place") from error


def parse(table: dict[str, Any], overrides: Sequence[str] = ()) -> Experiment:
    """Return the experiment that a table describes, after dotted overrides.

    Raises:
        ConfigError: if a key or value is not understood.
    """
    return decode(Experiment, apply_overrides(table, list(overrides)))
