"""Published defences, and the controls of ours: one file each, a recipe over objective, conversions and ensembles.

A baseline turns a `Setting` into an `Arm`. The setting decides network, epochs, optimizer and augmentation for all of
them, so that rows differ by their defence alone; each file names its paper, what it keeps of it and what it does not.
Adversarial images enter the training of the reference rows, and of others as told.

| file | defence | members | adversarial images |
|---|---|---|---|
| `vanilla` | none | 1 | no |
| `float_ensemble` | deep ensemble | M | no |
| `low_bit` | LSQ, DoReFa-Net or PACT | 1 | no |
| `low_bit_ensemble` | several bit widths, neither SQ nor MI | M | no |
| `empir` | mixed precision that votes | M | no |
| `adp`, `gal`, `trs` | members that differ by outputs, by input gradients | M | no |
| `parl` | members whose layers differ by input gradients | M | no |
| `dverge` | members that learn each other's weaknesses | M | of features |
| `defensive_quantization` | low bits, orthogonal layers | 1 | no |
| `random_precision` | Double-Win Quant | 1 | on request |
| `activation_pruning` | SAP | 1 | no |
| `parametric_noise` | PNI | 1 | on request |
| `self_ensemble` | RSE | 1, several passes | no |
| `input_gradient` | input-gradient penalty | 1 | no |
| `pgd_at`, `trades`, `fgsm_rs` | adversarial training: reference rows | 1 | yes |
| `sq`, `mi`, `gaussian_control` | controls of `sq_mi` | M | no |
| `sq_mi` | our reconstruction of arXiv 2312.00105 | M | no |
"""

from bitquorum.baselines.activation_pruning import ActivationPruning
from bitquorum.baselines.adp import ADP
from bitquorum.baselines.base import Baseline, RadiusBaseline, Setting
from bitquorum.baselines.defensive_quantization import DefensiveQuantization
from bitquorum.baselines.dverge import DVERGE
from bitquorum.baselines.empir import Empir
from bitquorum.baselines.fgsm_rs import FgsmRs
from bitquorum.baselines.float_ensemble import FloatEnsemble
from bitquorum.baselines.gal import GAL
from bitquorum.baselines.gaussian_control import GaussianControl
from bitquorum.baselines.input_gradient import InputGradient
from bitquorum.baselines.low_bit import LowBit
from bitquorum.baselines.low_bit_ensemble import LowBitEnsemble
from bitquorum.baselines.mi import Mi
from bitquorum.baselines.parametric_noise import ParametricNoise
from bitquorum.baselines.parl import PARL
from bitquorum.baselines.pgd_at import PgdAt
from bitquorum.baselines.random_precision import RandomPrecision
from bitquorum.baselines.self_ensemble import SelfEnsemble
from bitquorum.baselines.sq import Sq
from bitquorum.baselines.sq_mi import SqMi
from bitquorum.baselines.trades import Trades
from bitquorum.baselines.trs import TRS
from bitquorum.baselines.vanilla import Vanilla

__all__ = [
    "ADP",
    "DVERGE",
    "GAL",
    "PARL",
    "TRS",
    "ActivationPruning",
    "Baseline",
    "DefensiveQuantization",
    "Empir",
    "FgsmRs",
    "FloatEnsemble",
    "GaussianControl",
    "InputGradient",
    "LowBit",
    "LowBitEnsemble",
    "Mi",
    "ParametricNoise",
    "PgdAt",
    "RadiusBaseline",
    "RandomPrecision",
    "SelfEnsemble",
    "Setting",
    "Sq",
    "SqMi",
    "Trades",
    "Vanilla",
]
