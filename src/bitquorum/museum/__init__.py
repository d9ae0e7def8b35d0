"""Defences that are known to be broken, with known answers: a benchmark of evaluations."""

from bitquorum.museum.exhibits import EPSILON, NAMES, Exhibit, exhibits
from bitquorum.museum.run import Museum, is_museum, museum_rows, visit

__all__ = ["EPSILON", "NAMES", "Exhibit", "Museum", "exhibits", "is_museum", "museum_rows", "visit"]
