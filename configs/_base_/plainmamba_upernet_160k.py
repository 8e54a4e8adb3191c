"""UPerNet on four maps of PlainMamba, all of stride 16, ADE20K, 160,000 steps."""

_base_ = ["./upernet_160k.py"]

sync_bn = "torch"  # the backbone's batch norms too
model = dict(
    backbone=dict(_delete_=True, type="PlainMambaSegBackbone"),
    auxiliary_head=dict(in_index=3),
)

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))

# The last norm was published as ln1, so it decays.
undecayed = ["norm", "pos_embed", "A_log", "ssm.D", "direction_B"]
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(
        custom_keys={
            "backbone.model.norm.": dict(decay_mult=1.0),
            **{name: dict(decay_mult=0.0) for name in undecayed},
        }
    ),
)
