"""Tables from stored runs. Nothing in here computes: it reads rows and lays them out."""

from bitquorum.report.tables import Table, comparison, environments

__all__ = ["Table", "comparison", "environments"]
