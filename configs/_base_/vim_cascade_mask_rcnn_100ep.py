"""Cascade Mask R-CNN on Vim's simple feature pyramid, COCO, 100 epochs on squares of 1024, as ViTDet.

A configuration on top names the backbone and its pretrained weights. Published models were started from others than the
released classifiers: with a rotary embedding and summed directions (rope=True, average=False in the backbone).
"""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./coco_instance_1024.py", "./vim_100ep.py"]

norm_cfg = dict(type="LN2d", eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # squares in tests too: no side is longer
    backbone=dict(_delete_=True, type="VimDetBackbone", img_size=1024, drop_path_rate=0.1),
    neck=None,  # the backbone ends with its pyramid
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                norm_cfg=norm_cfg,
                roi_feat_size=7,
                num_classes=80,
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder", target_stds=[1 / weight, 1 / weight, 2 / weight, 2 / weight]
                ),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for weight in (10, 20, 30)
        ],
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
