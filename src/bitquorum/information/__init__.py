"""Measure entropy and mutual information, in bits; nothing in here knows a network.

| file | holds | differentiable |
|---|---|---|
| `tables` | entropy, MI and conditional MI of a probability table that is given | yes |
| `multivariate` | total correlation, dual total correlation and interaction information of a table | yes |
| `decomposition` | what two members know about the label: redundancy, unique parts, synergy | no |
| `channel` | what a noisy output says about its source: BALD per input, rate of a quantizer | yes |
| `joint` | soft joints of the predictions of two members, per class and moving | yes |
| `renyi` | matrix-based Rényi entropy and MI of features | yes |
| `laws` | laws whose MI is known in closed form: references and test oracles | no |
| `estimator` | `Estimator` and `Estimate`: what every estimator on samples declares and returns | no |
| `discrete` | `PlugIn` on integer codes, and the bias of plug-in MI | no |
| `undersampled` | `Shrinkage` and `NSB` on integer codes, for few samples against many cells | no |
| `neighbours` | `KSG` on features of few dimensions | no |
| `kernel` | `RenyiMI`: the entropies of `renyi` as an estimator | no |
| `critics` | `InfoNCE`, `SMILE` and `CLUB` on features, by trained networks | no |
| `conditioning` | any estimator within each value of a third variable | no |
| `resample` | `jackknife` of any functional of tables that examples contribute to | no |
| `calibration` | `calibrate`: what an estimator returns on Gaussians of the size at hand | no |

A new estimator is one file beside `discrete`: a subclass of `Estimator` that states `bound`, exported below
and tested on a law of `laws`. `docs/information.md` says which one to trust when.
"""

from bitquorum.information.calibration import Calibration, calibrate
from bitquorum.information.channel import bald, channel_rate
from bitquorum.information.conditioning import conditional
from bitquorum.information.critics import CLUB, SMILE, InfoNCE
from bitquorum.information.decomposition import Decomposition, decompose
from bitquorum.information.discrete import PlugIn, occupied_bias, plug_in_bias
from bitquorum.information.estimator import Bound, Estimate, Estimator
from bitquorum.information.joint import (
    class_joint,
    moving,
    pairs,
    pairwise_class_joints,
    pairwise_joints,
    soft_joint,
)
from bitquorum.information.kernel import RenyiMI
from bitquorum.information.laws import (
    binary_symmetric_channel,
    correlated_gaussians,
    independent_error_bits,
    independent_error_information,
    independent_error_joint,
    symmetric_channel,
)
from bitquorum.information.multivariate import dual_total_correlation, interaction_information, total_correlation
from bitquorum.information.neighbours import KSG
from bitquorum.information.renyi import (
    Bandwidth,
    gram,
    gram_mutual_information,
    renyi_entropy,
    renyi_mutual_information,
)
from bitquorum.information.resample import jackknife, leave_one_out, of_left_out
from bitquorum.information.tables import conditional_mutual_information, entropy, mutual_information
from bitquorum.information.undersampled import NSB, Shrinkage

__all__ = [
    "CLUB",
    "KSG",
    "NSB",
    "SMILE",
    "Bandwidth",
    "Bound",
    "Calibration",
    "Decomposition",
    "Estimate",
    "Estimator",
    "InfoNCE",
    "PlugIn",
    "RenyiMI",
    "Shrinkage",
    "bald",
    "binary_symmetric_channel",
    "calibrate",
    "channel_rate",
    "class_joint",
    "conditional",
    "conditional_mutual_information",
    "correlated_gaussians",
    "decompose",
    "dual_total_correlation",
    "entropy",
    "gram",
    "gram_mutual_information",
    "independent_error_bits",
    "independent_error_information",
    "independent_error_joint",
    "interaction_information",
    "jackknife",
    "leave_one_out",
    "moving",
    "mutual_information",
    "occupied_bias",
    "of_left_out",
    "pairs",
    "pairwise_class_joints",
    "pairwise_joints",
    "plug_in_bias",
    "renyi_entropy",
    "renyi_mutual_information",
    "soft_joint",
    "symmetric_channel",
    "total_correlation",
]
