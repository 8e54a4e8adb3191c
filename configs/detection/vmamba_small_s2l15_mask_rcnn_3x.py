"""Mask R-CNN on VMamba-S (s2l15), COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", pretrained="vmamba_small_s2l15.in1k", drop_path_rate=0.3),
)
