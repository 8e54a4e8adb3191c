"""Mask R-CNN with a feature pyramid on COCO, 12 epochs: what the hierarchical backbones share.

A configuration on top names the backbone, its pretrained weights, its drop path and its channels.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./coco_instance.py", "./adamw_1x.py"]

model = dict(
    backbone=dict(_delete_=True, type="MambaBackbone", out_indices=(0, 1, 2, 3), out_norm=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
