"""Data sets: items are (image float32 (3, H, W) in [0, 1], target long (H, W), 255 = void)."""

from segedu.data.camvid import CamVid
from segedu.data.cells import Cells
from segedu.data.toytown import Toytown

__all__ = ["CamVid", "Cells", "Toytown"]
