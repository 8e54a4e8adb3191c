"""Cascade Mask R-CNN on Vim-Ti, COCO, 100 epochs, with a pyramid and heads of 192 channels."""

_base_ = ["./vim_tiny_cascade_mask_rcnn_100ep.py"]

channels = 192
box_heads = [
    dict(
        type="Shared4Conv1FCBBoxHead",
        in_channels=channels,
        conv_out_channels=channels,
        fc_out_channels=768,
        norm_cfg=dict(type="LN2d", eps=1e-6),
        roi_feat_size=7,
        num_classes=80,
        reg_class_agnostic=True,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[1 / weight, 1 / weight, 2 / weight, 2 / weight]),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )
    for weight in (10, 20, 30)
]
roi_extractor = dict(out_channels=channels)
model = dict(
    backbone=dict(out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=box_heads,
        mask_roi_extractor=roi_extractor,
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
)
