"""One deterministic low-bit network: what quantization alone is worth.

Papers and recipes, by `scheme`, weights and activations of equal bits:

- `lsq`: Esser et al., 2020. Rounding to nearest on ranges that are learned with the weights. Deviations: one range per
  output channel of a weight; the first and last layer have the same bits (the paper: 8), the image stays in float;
  training starts from random weights, not from a float network.
- `dorefa`: Zhou et al., 2016. Weights by the hyperbolic tangent, inputs of layers clipped to [0, 1]. The first and
  last layer stay in float, gradients are not quantized.
- `pact`: Choi et al., 2018. Activations up to a learned clip in place of every ReLU, weights by DoReFa. A network with
  other activations gets ReLU. The first and last layer's weights stay in float.

Further deviations: those of `dorefa.Dorefa` and `dorefa.Pact`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final, get_args

from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import activated, apart, lsq
from bitquorum.config import Arm
from bitquorum.conversion import Conversion
from bitquorum.dorefa import Dorefa, Pact
from bitquorum.interface import InputError
from bitquorum.objective import Objective

Scheme = Literal["lsq", "dorefa", "pact"]


@final
@dataclass(frozen=True, kw_only=True)
class LowBit(Baseline):
    """Train one deterministic low-bit network.

    Attributes:
        bits: Of weights and activations.
        scheme: `lsq`, `dorefa` or `pact`.
    """

    bits: int = 4
    scheme: Scheme = "lsq"
    paper: ClassVar[str] = (
        "Esser et al., 2020, https://arxiv.org/abs/1902.08153; Zhou et al., 2016, https://arxiv.org/abs/1606.06160; "
        "Choi et al., 2018, https://arxiv.org/abs/1805.06085"
    )

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise InputError(f"expected a scheme among {', '.join(get_args(Scheme))}, got {self.scheme!r}")

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        if self.scheme == "pact":
            setting = activated(setting, "relu")
        return self._arm(setting, (self._member(),), Objective(terms=(apart(1),)))

    def _member(self) -> Conversion:
        if self.scheme == "lsq":
            return lsq(self.bits, self.bits)
        if self.scheme == "dorefa":
            return Dorefa(weight_bits=self.bits, activation_bits=self.bits, linear=True)
        return Pact(weight_bits=self.bits, activation_bits=self.bits)
