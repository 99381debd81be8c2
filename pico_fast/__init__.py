"""pico_fast: pixel contrast across images for semantic segmentation (PiCo), whole and fast."""

from pico_fast import on_gpu as _on_gpu  # noqa: F401  (registers the Triton implementations)
from pico_fast.anchors import sample_anchors
from pico_fast.attach import Tap, attach
from pico_fast.bank.memory_bank import MemoryBank
from pico_fast.contrast.function import contrast
from pico_fast.contrast.select_keys import SelectedKeys, select_keys
from pico_fast.dropin import PixelContrastLoss
from pico_fast.loss import JointLoss, PiCoLoss
from pico_fast.projection import ProjectionHead
from pico_fast.regions import region_pool
from pico_fast.selection.synthesis import Synthesis

__version__ = "0.1.0"

__all__ = [
    "JointLoss",
    "MemoryBank",
    "PiCoLoss",
    "PixelContrastLoss",
    "ProjectionHead",
    "SelectedKeys",
    "Synthesis",
    "Tap",
    "attach",
    "contrast",
    "region_pool",
    "sample_anchors",
    "select_keys",
]
