r"""TTT-MLP: as `ttt_linear`, with a network of two layers (Sun et al. 2024, section 2.7).

  f(k) = W_2 gelu(W_1 k + b_1) + b_2,   W_1 [D, expansion D],   gelu by tanh

W_1 starts at std `memory_std`, W_2 at that times the output map's factor 1 / sqrt(2 num_layers),
as in the layer's code.
"""

import dataclasses

from flax import nnx

from trellis_jax.mixers import ttt_linear


@dataclasses.dataclass(frozen=True)
class Config(ttt_linear.Config):
  """The knobs of TTT-MLP, on top of TTT-Linear's.

  Attributes:
    expansion: hidden units of the network, in head_dim.
  """

  base_lr: float = 0.1
  expansion: int = 4

  def __post_init__(self):
    super().__post_init__()
    self.at_least(1, "expansion")


class Mixer(ttt_linear.Mixer):
  """The TTT mixer with an MLP; see the module's equations."""

  def build_network(self, rngs: nnx.Rngs) -> None:
    """Makes the initial network."""
    c, d = self.config, self.head_dim
    stds = (c.memory_std, c.memory_std * self._out_scale)
    self.network((d, c.expansion * d, d), stds, True, rngs)
