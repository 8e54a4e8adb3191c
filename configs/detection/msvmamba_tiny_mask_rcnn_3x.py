"""Mask R-CNN on MSVMamba-T, COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="msvmamba_tiny", pretrained="msvmamba_tiny.in1k", drop_path_rate=0.2),
)
