"""12 epochs of AdamW on COCO, sixteen images a step; a tenth of the learning rate after 8 and 11 epochs."""

_base_ = ["mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)

optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="PublishedDecayConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
