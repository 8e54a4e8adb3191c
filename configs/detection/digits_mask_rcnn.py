"""A small Mask R-CNN that finds and cuts out handwritten digits: nine minutes on two CPU cores, nothing to download.

Data: 1,500 scenes of 96x96 that `vmamba scenes` makes, in COCO's format, in the folder that the variable
SCENES_ROOT of the environment names (data/digit_scenes unless set). It is made when it is missing.
"""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["vmamba.mm", "vmamba.mm.seeding"], allow_failed_imports=False)

# -- Data -------------------------------------------------------------------------------------------------------------

digit_scenes = dict(train=1500, val=150, size=96, seed=0)
data_root = "{{$SCENES_ROOT:data/digit_scenes}}"
digits = dict(classes=tuple("0123456789"))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        metainfo=digits,
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="images/training/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        metainfo=digits,
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="images/validation/"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "/annotations/instances_val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

# -- Model ------------------------------------------------------------------------------------------------------------

# What `vmamba train` leaves. It is trained first, in a minute and a half, where it is missing.
digits_classifier = "runs/vmamba_nano_32-digits/best.pth"

# Strides 4 and 8, of which a pyramid makes three maps of 64 channels. The digits are 10 to 50 pixels wide.
anchors = dict(scales=[6], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16])
maps = dict(out_channels=64, featmap_strides=[4, 8], finest_scale=28)

model = dict(
    backbone=dict(
        _delete_=True,
        type="MambaBackbone",
        model_name="vmamba_nano_32",
        pretrained=digits_classifier,
        out_indices=(1, 2),
    ),
    neck=dict(in_channels=[64, 128], out_channels=64, num_outs=3),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=anchors),
    roi_head=dict(
        bbox_roi_extractor=maps,
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=maps,
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

# -- Training ---------------------------------------------------------------------------------------------------------

epochs = 3
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(max_keep_ckpts=2))
custom_hooks = [dict(type="SeedByIteration")]
randomness = dict(seed=0)
