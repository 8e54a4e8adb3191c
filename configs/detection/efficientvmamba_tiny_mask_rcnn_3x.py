"""Mask R-CNN on EfficientVMamba-T, COCO, 36 epochs at many scales.

The published file gives the backbone other widths than its weights have, and its neck and heads the usual ones. The
paper's parameters (11 M) and operations (60 G) are those of a neck and heads of half that width.
"""

_base_ = ["../_base_/mask_rcnn_3x.py"]

channels = 128
roi_extractor = dict(out_channels=channels)
model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", pretrained="efficientvmamba_tiny.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=channels, fc_out_channels=512),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
)

optim_wrapper = dict(type="AmpOptimWrapper")
