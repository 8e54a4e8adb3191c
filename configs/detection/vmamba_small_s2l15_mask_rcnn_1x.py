"""Mask R-CNN on VMamba-S (s2l15), COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", pretrained="vmamba_small_s2l15.in1k", drop_path_rate=0.3),
)
