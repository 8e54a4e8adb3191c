"""Mask R-CNN on Spatial-Mamba-B, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="spatialmamba_base", pretrained="spatialmamba_base.in1k", drop_path_rate=0.5),
)
