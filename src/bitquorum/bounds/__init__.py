"""Bound what a network can say over a ball of images: intervals and lines through every layer and quantizer."""

from bitquorum.bounds.margins import Bound, ball, margins, output
from bitquorum.bounds.network import RULES, Rule, propagate
from bitquorum.bounds.nodes import Box, Node
from bitquorum.bounds.scope import SMALLEST, Scope, Validity

__all__ = [
    "RULES",
    "SMALLEST",
    "Bound",
    "Box",
    "Node",
    "Rule",
    "Scope",
    "Validity",
    "ball",
    "margins",
    "output",
    "propagate",
]
