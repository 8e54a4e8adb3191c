"""Mask R-CNN on EfficientVMamba-T, COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", pretrained="efficientvmamba_tiny.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384]),
)

optim_wrapper = dict(type="AmpOptimWrapper")
