"""Measure entropy and mutual information, in bits; nothing in here knows a network.

| file | holds | differentiable |
|---|---|---|
| `tables` | entropy, MI and conditional MI of a probability table that is given | yes |
| `joint` | soft joints of the predictions of two members, per class and moving | yes |
| `renyi` | matrix-based Rényi entropy and MI of features | yes |
| `laws` | laws whose MI is known in closed form: references and test oracles | no |
| `estimator` | `Estimator` and `Estimate`: what every estimator on samples declares and returns | no |
| `discrete` | `PlugIn` on integer codes, and the bias of plug-in MI | no |

A new estimator is one file beside `discrete`: a subclass of `Estimator` that states `bound`, exported below
and tested on a law of `laws`.
"""

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
from bitquorum.information.laws import (
    binary_symmetric_channel,
    independent_error_information,
    independent_error_joint,
    symmetric_channel,
)
from bitquorum.information.renyi import (
    Bandwidth,
    gram,
    gram_mutual_information,
    renyi_entropy,
    renyi_mutual_information,
)
from bitquorum.information.tables import conditional_mutual_information, entropy, mutual_information

__all__ = [
    "Bandwidth",
    "Bound",
    "Estimate",
    "Estimator",
    "PlugIn",
    "binary_symmetric_channel",
    "class_joint",
    "conditional_mutual_information",
    "entropy",
    "gram",
    "gram_mutual_information",
    "independent_error_information",
    "independent_error_joint",
    "moving",
    "mutual_information",
    "occupied_bias",
    "pairs",
    "pairwise_class_joints",
    "pairwise_joints",
    "plug_in_bias",
    "renyi_entropy",
    "renyi_mutual_information",
    "soft_joint",
    "symmetric_channel",
]
