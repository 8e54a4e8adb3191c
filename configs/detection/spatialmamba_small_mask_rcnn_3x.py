"""Mask R-CNN on Spatial-Mamba-S, COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="spatialmamba_small", pretrained="spatialmamba_small.in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
