"""The expected share of the op in a training step follows from the committed estimates."""

from flax import nnx

from benchmarks import kernel_tpu, step_share
from trellis_jax import LM, LMConfig


def test_the_committed_page_is_what_the_committed_estimates_give():
  assert step_share.RESULTS.read_text() == step_share.report(kernel_tpu.committed())


def test_the_products_are_those_of_the_model():
  widths = dict(width=step_share.WIDTH, num_layers=step_share.LAYERS, num_heads=step_share.HEADS)
  cfg = LMConfig(step_share.VOCAB, **widths, mlp_width=step_share.MLP)
  model = nnx.eval_shape(lambda: LM(cfg, rngs=nnx.Rngs(0)))
  m, d, c = step_share.SLOTS, step_share.HEAD, 64
  stale = 3 * m * 2 * d + 2 * c * (d + m)
  memory = stale + c * 2 * d + 2 * c * m + 2 * c * c // 3
  op = step_share.LAYERS * step_share.HEADS * memory
  assert model.flops(2048) == 2 * 2048 * (sum(step_share.weights().values()) + op)
