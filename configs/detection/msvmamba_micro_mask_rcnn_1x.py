"""Mask R-CNN on MSVMamba-M, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="msvmamba_micro", pretrained="msvmamba_micro.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
