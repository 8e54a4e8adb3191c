"""Mask R-CNN on VMamba-T (s2l5), COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", pretrained="vmamba_tiny_s2l5.in1k", drop_path_rate=0.2),
)
