"""Mask R-CNN on MSVMamba-M, COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="msvmamba_micro", pretrained="msvmamba_micro.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
