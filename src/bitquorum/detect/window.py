"""Measure how suspicious a window of inputs looks by the MI of the members' votes in it."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bitquorum import rng
from bitquorum.detect.reference import CleanReference, one_hot_votes, paired
from bitquorum.detect.statistics import Statistic
from bitquorum.information import mutual_information
from bitquorum.interface import InputError


@final
@dataclass(frozen=True, kw_only=True)
class WindowMI(Statistic):
    r"""Score a window of inputs by how far the MI of the members' votes in it lies from that of clean windows (D3).

    $$\Big| \frac{1}{LP} \sum_{i<j, t} \hat I_{ijt} - \bar I \Big|, \quad
    \hat I = I(\text{counts} / N) - \frac{K_{ab} - K_a - K_b + 1}{2 N \ln 2}$$

    in bits, of the votes of P pairs under L draws on N inputs. An attack can lower the MI, where members part, or raise
    it, where all are led to one answer more firmly than by clean images: hence both sides.

    Bias: a window has far fewer votes than a table has cells, and Miller and Madow's correction removes only part of
    the bias. At N = 50 and ten classes $\hat I$ lies above the truth by 0.3 bits for two members that are right on 95 %
    of the images, by 0.8 bits on 50 % (errors independent and uniform), at N = 200 by 0.2 and 0.1. So the centre
    $\bar I$ is not the MI of the clean joint but the mean of the same estimate over `resamples` windows of N votes
    drawn from it, which shares the bias of clean windows; windows under attack have another one, which counts as a part
    of the difference.

    The MI of a window also falls where the inputs hold fewer classes: windows must have the mixture of classes of the
    clean images, or that, too, is reported.

    One member has its draws as views, as in `PointwiseMI`. Our own statistic; Miller, 1955, for the correction.

    Attributes:
        window: Number N of inputs, at least two.
        resamples: Number of windows behind the centre.
        seed: Of these windows.

    Examples:
        >>> votes = torch.eye(2).repeat(10, 1).expand(1, 2, 20, 2)
        >>> reference = CleanReference.fit(votes)
        >>> WindowMI(window=10)(votes, reference).shape
        torch.Size([2])
    """

    name: ClassVar[str] = "window-mi"
    needs_pairs: ClassVar[bool] = True

    window: int = 50
    resamples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 2 or self.resamples < 1:
            raise InputError(
                f"expected a window of at least two inputs and at least one resample, got {self.window} and "
                f"{self.resamples}"
            )

    def __call__(
        self, logits: Float[Tensor, "draw member batch classes"], reference: CleanReference
    ) -> Float[Tensor, "windows"]:
        """Return one score for each consecutive window; inputs behind the last full one are left out."""
        full = logits.shape[2] // self.window
        if not full:
            raise InputError(f"expected at least one window of {self.window} inputs, got {logits.shape[2]} inputs")
        found = []
        for part in logits[:, :, : full * self.window].split(self.window, 2):
            first, second = paired(one_hot_votes(part))
            found.append(corrected_information(torch.einsum("plna,plnb->plab", first, second)).mean())
        return (torch.stack(found) - self.centre(reference)).abs().to(logits)

    def centre(self, reference: CleanReference) -> float:
        """Return the mean estimate over clean windows: of votes drawn from the clean joint."""
        pairs, classes = reference.joints.shape[:2]
        edges = reference.joints.flatten(1).double().cumsum(-1)
        examples = torch.arange(self.resamples, device=edges.device)
        uniform = rng.uniform(self.seed, examples, pairs * self.window, address="window").double()
        uniform = uniform.view(self.resamples, pairs, self.window).transpose(0, 1)
        codes = torch.searchsorted(edges, uniform.flatten(1).contiguous()).clamp(max=classes**2 - 1)
        codes = codes.view(pairs, self.resamples, self.window)
        counts = edges.new_zeros(pairs, self.resamples, classes**2)
        counts.scatter_add_(-1, codes, torch.ones_like(codes, dtype=edges.dtype))
        return float(corrected_information(counts.unflatten(-1, (classes, classes))).mean())


def corrected_information(counts: Float[Tensor, "*tables a b"]) -> Float[Tensor, "*tables"]:
    """Return the MI of tables of counts, less Miller and Madow's bias, in bits; see `information.PlugIn`.

    Examples:
        >>> corrected_information(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
        tensor(1.0721)
    """
    total = counts.sum((-2, -1))
    filled = counts > 0
    rows, columns = filled.any(-1).sum(-1), filled.any(-2).sum(-1)
    bias = (filled.sum((-2, -1)) - rows - columns + 1) / (2 * math.log(2) * total)
    return mutual_information(counts / total[..., None, None]) - bias


def resampled(count: int, window: int, windows: int, *, seed: int) -> Int[Tensor, "rows"]:
    """Return the rows of `windows` random windows of `window` different inputs out of `count`, window by window.

    Raises:
        InputError: if there are fewer inputs than a window has.

    Examples:
        >>> sorted(resampled(3, 3, 1, seed=0).tolist())
        [0, 1, 2]
    """
    if count < window:
        raise InputError(f"expected at least a window of {window} inputs, got {count}")
    order = rng.uniform(seed, torch.arange(windows), count, address="resampled").argsort(-1)
    return order[:, :window].flatten()
