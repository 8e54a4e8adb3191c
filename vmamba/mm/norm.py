"""A norm for detection heads that MMCV and MMDetection lack."""

from mmengine.registry import MODELS
from timm.layers import LayerNorm2d

# LayerNorm over the channels of maps (batch, channels, height, width), which ViTDet's heads have; MMCV's "LN" is over
# the last dimension.
MODELS.register_module("LN2d", module=LayerNorm2d)
