"""RetinaNet on PlainMamba's adapter, COCO, 12 epochs."""

_base_ = ["./retinanet_1x.py"]

sync_bn = "torch"  # the backbone's batch norms too
find_unused_parameters = True  # nothing reads the adapter's map of stride 4
model = dict(
    backbone=dict(_delete_=True, type="PlainMambaAdapter"),
    neck=dict(start_level=1, add_extra_convs="on_output", norm_cfg=dict(type="SyncBN", requires_grad=True)),
)

undecayed = ["level_embed", "pos_embed", "norm", "bias", "A_log", "ssm.D", "direction_B"]
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in undecayed}),
    clip_grad=dict(max_norm=35, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
