"""RSE: random self-ensemble, Gaussian noise before every convolution, averaged over passes.

Paper: Liu, Cheng, Zhang, Hsieh, 2018. Noise of deviation 0.2 reaches the image and 0.1 every other convolution, in
training and at test; a prediction is the mean probability of several passes.

Deviations: the noise joins the image behind the network's normalization, and 0.8 there is 0.2 of images in [0, 1] at a
deviation of 0.25, CIFAR-10's; set `image` to 0.2 over that of other data. A prediction averages 5 passes for speed,
where the authors' scripts average up to 50.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from bitquorum import randomized
from bitquorum.baselines.base import Baseline, Setting
from bitquorum.baselines.parts import apart
from bitquorum.config import Arm
from bitquorum.objective import Objective


@final
@dataclass(frozen=True, kw_only=True)
class SelfEnsemble(Baseline):
    """Train one network with noise before every convolution, and average several passes at test.

    Attributes:
        image: Standard deviation of the noise on the normalized image.
        inner: Standard deviation of the noise before every other convolution.
        passes: Draws that one prediction averages over.
    """

    image: float = 0.8
    inner: float = 0.1
    passes: int = 5
    paper: ClassVar[str] = "Liu, Cheng, Zhang, Hsieh, 2018, https://arxiv.org/abs/1712.00673"

    def __call__(self, setting: Setting) -> Arm:
        """Return the arm."""
        member = randomized.LayerNoise(image=self.image, inner=self.inner)
        return self._arm(setting, (member,), Objective(terms=(apart(1),)), passes=self.passes)
