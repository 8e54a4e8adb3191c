"""Mask R-CNN on vanilla VMamba-B, COCO, 12 epochs.

The published one started from weights that are listed no longer (drop path 0.5, 83.2 % top-1).
"""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_base", pretrained="vanilla_vmamba_base.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
