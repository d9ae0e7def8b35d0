"""Certify accuracy: what no attack within a radius can take away, for every draw or for draws that are looked at."""

from bitquorum.bounds import Bound, Scope, Validity, margins
from bitquorum.certify.aggregate import TIE, holds, probability_gap
from bitquorum.certify.certify import Certificate, Certify, Statement

__all__ = [
    "TIE",
    "Bound",
    "Certificate",
    "Certify",
    "Scope",
    "Statement",
    "Validity",
    "holds",
    "margins",
    "probability_gap",
]
