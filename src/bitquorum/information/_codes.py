"""Count pairs of integer codes, in memory that grows with the samples and not with the number of possible cells."""

from dataclasses import dataclass

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from bitquorum.interface import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Hold the counts of a table of pairs: of its occupied cells, in float64, and of its rows and columns."""

    cells: Float[Tensor, "cells"]
    row: Int[Tensor, "cells"]
    column: Int[Tensor, "cells"]
    rows: Float[Tensor, "rows"]
    columns: Float[Tensor, "columns"]
    samples: int

    def pointwise(self) -> Float[Tensor, "cells"]:
        """Return log2 of n_ab N / (n_a n_b) for every occupied cell; its mean over the samples is the plug-in MI."""
        return (self.cells * self.samples / (self.rows[self.row] * self.columns[self.column])).log2()

    def standard_error(self) -> float:
        """Return the standard error of the plug-in MI by the delta method, in bits."""
        weights, pointwise = self.cells / self.samples, self.pointwise()
        variance = (weights * (pointwise - (weights * pointwise).sum()).square()).sum()
        return float((variance / self.samples).sqrt())


def count(a: Shaped[Tensor, "samples"], b: Shaped[Tensor, "samples"], name: str) -> Counts:
    """Count the pairs of two vectors of integer codes; any integers, any number of them.

    Raises:
        InputError: if the codes are not integers, of one dimension and paired.
    """
    for codes in (a, b):
        if codes.dim() != 1 or codes.is_floating_point() or codes.is_complex():
            raise InputError(f"{name}: expected integer codes [N], got {codes.dtype} {tuple(codes.shape)}")
    if a.shape != b.shape or a.shape[0] == 0:
        raise InputError(f"{name}: expected two equally many samples, at least one, got {len(a)} and {len(b)}")
    _, row, rows = a.cpu().unique(return_inverse=True, return_counts=True)
    _, column, columns = b.cpu().unique(return_inverse=True, return_counts=True)
    cell, cells = (row * len(columns) + column).unique(return_counts=True)
    return Counts(
        cells=cells.double(),
        row=cell // len(columns),
        column=cell % len(columns),
        rows=rows.double(),
        columns=columns.double(),
        samples=a.shape[0],
    )
