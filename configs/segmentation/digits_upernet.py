"""A small UPerNet that labels the pixels of handwritten digits: a quarter of an hour on two cores, nothing to download.

Data: 1,500 scenes of 96x96 that `vmamba scenes` makes, laid out as ADE20K, in the folder that the variable
SCENES_ROOT of the environment names (data/digit_scenes unless set). It is made when it is missing.
"""

# "mmseg::" would look for a distribution called mmsegmentation, which OneDL's fork is not; a path finds both.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/models/upernet_r50.py",
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/default_runtime.py",
]
custom_imports = dict(imports=["vmamba.mm", "vmamba.mm.seeding"], allow_failed_imports=False)

# -- Data -------------------------------------------------------------------------------------------------------------

digit_scenes = dict(train=1500, val=150, size=96, seed=0)
data_root = "{{$SCENES_ROOT:data/digit_scenes}}"
digits = dict(classes=("background", *"0123456789"))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=digits,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=10,
    num_workers=1,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=digits,
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

# For --tta: three sizes. No flips: a mirrored digit is none.
tta_model = dict(type="SegTTAModel")
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (0.75, 1.0, 1.25)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]

# -- Model ------------------------------------------------------------------------------------------------------------

# What `vmamba train` leaves. It is trained first, in a minute and a half, where it is missing.
digits_classifier = "runs/vmamba_nano_32-digits/best.pth"

norm = dict(type="BN", requires_grad=True)
# Five sixths of the pixels are background: at full weight, nothing else is learnt for long.
loss = dict(class_weight=[0.4] + [1.0] * 10)

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    pretrained=None,  # ResNet's
    backbone=dict(
        _delete_=True,
        type="MambaBackbone",
        model_name="vmamba_nano_32",
        pretrained=digits_classifier,
        out_indices=(0, 1, 2),
    ),
    decode_head=dict(
        in_channels=[32, 64, 128],
        in_index=[0, 1, 2],
        channels=64,
        num_classes=11,
        norm_cfg=norm,
        loss_decode=loss,
        init_cfg=dict(type="Normal", std=0.05, override=dict(name="conv_seg")),
    ),
    auxiliary_head=dict(in_channels=128, in_index=2, channels=64, num_classes=11, norm_cfg=norm, loss_decode=loss),
)

# -- Training ---------------------------------------------------------------------------------------------------------

epochs = 10
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=5)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=5e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.2)}),  # it knows digits; the head has all to learn
    clip_grad=dict(max_norm=5),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, begin=0, end=epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=25),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
log_processor = dict(by_epoch=True)
custom_hooks = [dict(type="SeedByIteration")]
randomness = dict(seed=0)
