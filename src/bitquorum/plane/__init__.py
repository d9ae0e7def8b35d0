"""Place ensembles in the adversarial information plane: how much members agree, against how often they are right.

| file | holds |
|---|---|
| `plane` | `Plane`: which threats are laid into the plane, and by how many draws |
| `point` | the coordinates of one threat: MI between members, with the label, residuals, accuracy |
| `correlation` | correlations of MI and accuracy along threats, with permutation tests |
| `layers` | noise and rate of every quantizer |
"""

from bitquorum.plane.correlation import Correlation, correlate, correlation_rows
from bitquorum.plane.layers import layer_rows
from bitquorum.plane.plane import Plane
from bitquorum.plane.point import place

__all__ = ["Correlation", "Plane", "correlate", "correlation_rows", "layer_rows", "place"]
