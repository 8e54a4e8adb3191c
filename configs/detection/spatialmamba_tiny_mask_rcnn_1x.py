"""Mask R-CNN on Spatial-Mamba-T, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="spatialmamba_tiny", pretrained="spatialmamba_tiny.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
