"""Define what a baseline is: a published defence as a recipe over our objective, conversions and ensembles."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Final

from bitquorum.config import Arm
from bitquorum.conversion import Conversion
from bitquorum.ensemble import Aggregation, MeanProbability
from bitquorum.interface import InputError, Method
from bitquorum.objective import DVERGE, Adversarial, Objective, Trades
from bitquorum.registry import type_name
from bitquorum.train import Trainer
from bitquorum.zoo import DigitsNet, Network

_ATTACKING: Final = (Adversarial, Trades, DVERGE)


@dataclass(frozen=True, kw_only=True)
class Setting(Method):
    """Hold what all baselines of a comparison share.

    Attributes:
        network: Architecture of every member.
        trainer: Epochs, batches, optimizer and augmentation.
        epsilon: Radius in the maximum norm that the comparison is about; a baseline with a radius of its own in
            training takes this one unless it is given another.
        members: Number of members of an ensemble.
    """

    network: Network = field(default_factory=DigitsNet)
    trainer: Trainer = field(default_factory=Trainer)
    epsilon: float = 5 / 255
    members: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1 or self.members < 1:
            raise InputError(
                f"expected epsilon in (0, 1] and at least one member, got {self.epsilon} and {self.members}"
            )


@dataclass(frozen=True, kw_only=True)
class Baseline(Method, ABC):
    """Turn a setting into the arm that trains and deploys a defence.

    The setting decides the network, epochs, optimizer and augmentation, so that rows differ by their defence alone;
    schedules of the papers are not kept.

    Attributes:
        name: Of its row; the type's name unless it is given.
        paper: Authors, year and address.
    """

    name: str = ""
    paper: ClassVar[str]

    @property
    def title(self) -> str:
        """The name of its row."""
        return self.name or type_name(type(self))

    @property
    def adversarial(self) -> bool:
        """Whether adversarial images of any kind, also those of a surrogate loss, enter its training."""
        return any(isinstance(term, _ATTACKING) for term in self(Setting()).objective.terms)

    @abstractmethod
    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""

    def _arm(
        self,
        setting: Setting,
        members: tuple[Conversion, ...],
        objective: Objective,
        *,
        aggregation: Aggregation | None = None,
        passes: int = 1,
    ) -> Arm:
        return Arm(
            name=self.title,
            network=setting.network,
            members=members,
            aggregation=aggregation or MeanProbability(),
            passes=passes,
            objective=objective,
            trainer=setting.trainer,
        )


@dataclass(frozen=True, kw_only=True)
class RadiusBaseline(Baseline, ABC):
    """Share the radius of what a defence trains against.

    Attributes:
        epsilon: In the maximum norm; `None` takes the setting's.
    """

    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.epsilon is not None and not 0 < self.epsilon <= 1:
            raise InputError(f"expected epsilon in (0, 1], or none for the setting's, got {self.epsilon}")

    def _radius(self, setting: Setting) -> float:
        return setting.epsilon if self.epsilon is None else self.epsilon
