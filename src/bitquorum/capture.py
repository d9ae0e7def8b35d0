"""Record a training step as a CUDA graph: a GPU then waits for no launch, and small kernels cost what they compute.

A step of a low-bit network under an input-gradient penalty is thousands of short kernels, whose launches take several
times longer than the kernels themselves. Recorded once and replayed, they follow each other without the host.
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from bitquorum.ensemble import Ensemble
from bitquorum.layers import Noise, QuantLayer
from bitquorum.objective import Objective
from bitquorum.quantizers import Quantizer, SmoothLaw
from bitquorum.randomized import RandomSwitch

WARMUP = 3
"""Steps that run plainly before the record: kernels compile, and caches fill, outside of it."""

Values = dict[str, float | Tensor]
Body = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Values]]


def fits_capture(ensemble: Ensemble, objective: Objective, device: torch.device) -> bool:
    """Return whether a step is the same kernels each time: on CUDA, with terms that say so, and nothing else by chance.

    Noise of weights, and the choice of one network among several, are keyed by the seed alone, which a record holds
    fixed. How many thresholds are summed under a learned noise scale is read from its value. Dropout draws by torch's
    own generator, and a module of one's own that is `stochastic` may draw as it likes.
    """
    varies = any(
        isinstance(module, RandomSwitch | nn.modules.dropout._DropoutNd)
        or (getattr(module, "stochastic", False) and not isinstance(module, QuantLayer | Quantizer | Noise))
        or (isinstance(module, QuantLayer) and module.quantizer.stochastic)
        or (isinstance(module, Quantizer) and isinstance(module.law, SmoothLaw) and module.law.learned)
        for module in ensemble.members.modules()
    )
    return device.type == "cuda" and not varies and all(term.capturable for term in objective.terms)


@final
class CapturedStep:
    """Call a function of a batch; the first calls run plainly, the next is recorded, and from then on replayed.

    The function computes the loss of a batch and its backward pass. What it reads besides its arguments (weights,
    running statistics) must keep its place in memory; what it returns the next call overwrites, and the gradients too.

    Args:
        body: Takes a batch, images first, and the weight of each term, all as tensors.
        parameters: Whose gradients it computes.
    """

    def __init__(self, body: Body, parameters: Sequence[Tensor]) -> None:
        self.body, self.parameters = body, parameters
        self.calls = 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: tuple[Tensor, ...] = ()
        self.weights: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, Values] | None = None

    def __call__(self, batch: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Values]:
        """Return the loss and the values of the terms; gradients lie in the parameters."""
        if not self.inputs:
            self.inputs = tuple(part.clone() for part in batch)
            self.weights = tuple(torch.zeros((), device=batch[0].device) for _ in weights)
        for held, given in zip(self.inputs, batch, strict=True):
            held.copy_(given)
        for held, weight in zip(self.weights, weights, strict=True):
            held.fill_(weight)
        self.calls += 1
        if self.calls <= WARMUP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self._run()
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.outputs is None:
            with torch.cuda.graph(self.graph):
                self.outputs = self._run()
        self.graph.replay()
        return self.outputs

    def _run(self) -> tuple[Tensor, Values]:
        for parameter in self.parameters:
            parameter.grad = None
        images, *rest = self.inputs
        return self.body((images.detach(), *rest), self.weights)  # a new leaf in the same memory
