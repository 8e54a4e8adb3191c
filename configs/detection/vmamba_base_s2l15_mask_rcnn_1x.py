"""Mask R-CNN on VMamba-B (s2l15), COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="vmamba_base_s2l15", pretrained="vmamba_base_s2l15.in1k", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
