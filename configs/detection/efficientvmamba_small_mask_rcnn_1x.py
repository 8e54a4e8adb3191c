"""Mask R-CNN on EfficientVMamba-S, COCO, 12 epochs.

The published file gives the backbone other widths than its weights and its neck have; here they fit.
"""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_small", pretrained="efficientvmamba_small.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)

optim_wrapper = dict(type="AmpOptimWrapper")
