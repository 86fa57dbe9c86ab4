"""Dense causal attention: the quality anchor, and the trunk that retrofits fork from."""
import dataclasses
from typing import ClassVar

from nsa.methods import interface


@dataclasses.dataclass
class Dense(interface.Method):
  """Softmax attention over all previous tokens (arXiv 1706.03762, eq. 1). No options."""
  name: ClassVar[str] = "dense"
  has_sparse: ClassVar[bool] = False
