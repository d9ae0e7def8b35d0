"""Make what the members' layers respond to differ: one direction in the image for each layer, apart in each pair."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.interface import InputError
from bitquorum.objective.distill import weighted_outputs
from bitquorum.objective.peers import cosines
from bitquorum.objective.term import Step, Term


@final
@dataclass(frozen=True, kw_only=True)
class PARL(Term):
    r"""Turn the input gradients of the members' first layers apart, layer by layer.

    $$\frac{1}{L} \sum_{l \le L} \sum_{i<j} \cos(g_i^l, g_j^l), \quad g_m^l = \nabla_x \sum_k f_{m, k}^l(x)$$

    averaged over examples, with $f_m^l$ the output of the l-th weighted layer of member m, before norm and activation;
    the layer that gives the logits is left out. No label enters. It needs second derivatives.

    Reference: Alam et al., 2021, PARL, first version, https://arxiv.org/abs/2112.04948v1: pairwise, of each layer, with
    respect to the input. The rest is that of the authors' code, https://github.com/shubhishukla10/PARL: outputs are
    summed, pairs too, layers averaged, 5 layers, and 0.25 as the weight beside the mean cross-entropy. That code is of
    the second version (Shukla et al., 2025), which takes gradients in the weights and multiplies their cosines by the
    correlation of the outputs: another loss, which is not here, so that its weight is our choice for this one.

    Deviations: cosines are those of single examples, our reading; linear layers and the convolutions of skip
    connections count as layers, in order of execution, up to the depth of the shallowest member. The layers are seen
    in a pass of their own under the step's draw, so that batch statistics move twice a step. Of a first convolution on
    grey images the gradient is nearly constant, and its cosine the product of two signs. Norms below 1e-8 count as
    about 1e-8.

    Attributes:
        layers: Largest number of layers L, at least one.
    """

    weight: float = 0.25
    layers: int = 5
    needs_image_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise InputError(f"expected layers, a number of at least one, got {self.layers}")

    def __call__(self, step: Step) -> Float[Tensor, ""]:
        """Return the mean over layers and examples of the sum over pairs, zero for a single member.

        Raises:
            InputError: if a member has no layer before that of its logits.
        """
        members = list(step.ensemble.members)
        if len(members) < 2:
            return step.images.new_zeros(())
        gradients = [self._layer_gradients(step, member) for member in members]
        values = [cosines(torch.stack(layer)).sum(0).mean() for layer in zip(*gradients, strict=False)]
        return torch.stack(values).mean()

    def _layer_gradients(self, step: Step, member: nn.Module) -> list[Float[Tensor, "batch pixels"]]:
        with rng.draw(step.seed, step.examples):
            outputs = weighted_outputs(member, step.images)[:-1][: self.layers]
        if not outputs:
            raise InputError(f"expected a member with a layer before its logits, got {type(member).__name__}")
        return [
            torch.autograd.grad(output, step.images, torch.ones_like(output), create_graph=True)[0].flatten(1)
            for output in outputs
        ]
