"""Mask R-CNN on vanilla VMamba-T, COCO, 36 epochs at many scales."""

_base_ = ["../_base_/mask_rcnn_3x.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_tiny", pretrained="vanilla_vmamba_tiny.in1k", drop_path_rate=0.2),
)
