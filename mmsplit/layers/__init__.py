"""What belongs together: tensor names to layers, in forward order.

Pure: names in, `LayerMap` out.  The rules are one table, `rules.py`; the rest of the room reads names
(`naming.py`), finds stacks (`stacks.py`), orders layers (`ordering.py`) and compares with config.json
(`crosscheck.py`).
"""

from mmsplit.layers.build import build_layer_map
from mmsplit.layers.layer import LAYER_TYPES, Layer, LayerMap

__all__ = ["LAYER_TYPES", "Layer", "LayerMap", "build_layer_map"]
