"""100 epochs of AdamW on COCO in 184,375 steps of 64 images, with a learning rate that falls from layer to layer.

As published, only the position embedding does not decay.
"""

_base_ = ["mmdet::_base_/default_runtime.py"]

custom_imports = dict(imports=["vmamba.mm"], allow_failed_imports=False)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    paramwise_cfg=dict(decay_rate=0.7, custom_keys={"pos_embed": dict(decay_mult=0.0)}),
)
train_cfg = dict(type="IterBasedTrainLoop", max_iters=184_375, val_interval=5000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=250),
    dict(type="MultiStepLR", by_epoch=False, begin=0, end=184_375, milestones=[163_889, 177_546], gamma=0.1),
]
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=3),
)
log_processor = dict(by_epoch=False)
auto_scale_lr = dict(enable=False, base_batch_size=64)
