"""Mask R-CNN on COCO, 36 epochs at many scales: the augmentation of DETR and Sparse R-CNN."""

_base_ = ["./mask_rcnn_1x.py"]

short_sides = [(side, 1333) for side in range(480, 801, 32)]
resize = dict(type="RandomChoiceResize", scales=short_sides, keep_ratio=True)
crop_between_resizes = [
    dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
    resize,
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[resize], crop_between_resizes]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
