"""Mask R-CNN on PlainMamba's adapter, COCO, 12 epochs. The box head is four convolutions and one linear layer."""

_base_ = ["./mask_rcnn_1x.py"]

sync_bn = "torch"  # the backbone's batch norms too
norm = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(_delete_=True, type="PlainMambaAdapter"),
    neck=dict(norm_cfg=norm),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=norm)),
)
train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))

undecayed = ["level_embed", "pos_embed", "norm", "bias", "A_log", "ssm.D", "direction_B"]
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in undecayed}),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
