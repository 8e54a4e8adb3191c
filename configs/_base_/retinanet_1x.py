"""RetinaNet with a feature pyramid on COCO, 12 epochs: what the hierarchical backbones share."""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./coco_detection.py", "./adamw_1x.py"]

model = dict(
    # The pyramid starts at stride 8; a stage without a reader would have an out norm without a gradient.
    backbone=dict(_delete_=True, type="MambaBackbone", out_indices=(1, 2, 3), out_norm=True),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
