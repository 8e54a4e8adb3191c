"""Mask R-CNN on MSVMamba-T, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="msvmamba_tiny", pretrained="msvmamba_tiny.in1k", drop_path_rate=0.2),
)
