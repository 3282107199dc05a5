"""Shape glossary and array aliases.

  B  batch rows                       T  tokens of a row
  H  heads                            D  key width of a head
  V  value width of a head            M  slots of a memory
  C  chunk length in tokens           N  grid slots of a row, a multiple of C
  K  taps of a short convolution

Memories are `S_k [H, M, D]` and `S_v [H, M, V]` (paper, section 2); a state adds the leading B.
"""

from typing import TypeAlias

import jax
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array
Scalar: TypeAlias = Float[Array, ""]

Keys: TypeAlias = Float[Array, "B T H D"]
Values: TypeAlias = Float[Array, "B T H V"]
Targets: TypeAlias = Float[Array, "B T H M"]
Gates: TypeAlias = Float[Array, "B T H"]
SegmentIds: TypeAlias = Int[Array, "B T"]
Mask: TypeAlias = Bool[Array, "B T"]
Tokens: TypeAlias = Int[Array, "B T"]
Hidden: TypeAlias = Float[Array, "B T width"]
Logits: TypeAlias = Float[Array, "B T vocab"]
Memory: TypeAlias = tuple[Float[Array, "H M D"], Float[Array, "H M V"]]
