"""Mask R-CNN on MSVMamba-N, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="msvmamba_nano", pretrained="msvmamba_nano.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
