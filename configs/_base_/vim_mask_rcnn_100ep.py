"""Mask R-CNN on Vim's simple feature pyramid, COCO, 100 epochs on squares of 1024; see vim_cascade_mask_rcnn_100ep."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./coco_instance_1024.py", "./vim_100ep.py"]

norm_cfg = dict(type="LN2d", eps=1e-6)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1024),  # squares in tests too: no side is longer
    backbone=dict(_delete_=True, type="VimDetBackbone", img_size=1024, drop_path_rate=0.1),
    neck=None,  # the backbone ends with its pyramid
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    ),
)
