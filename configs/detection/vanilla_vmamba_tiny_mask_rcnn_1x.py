"""Mask R-CNN on vanilla VMamba-T, COCO, 12 epochs."""

_base_ = ["../_base_/mask_rcnn_1x.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_tiny", pretrained="vanilla_vmamba_tiny.in1k", drop_path_rate=0.2),
)
