"""UPerNet on four maps of Vim, ADE20K, 60,000 steps of 32 crops of 512x512; tests slide a window of 512.

A configuration on top names the backbone, its pretrained weights, its channels and its learning rates. Published models
were started from others than the released classifiers, and the small one with a rotary embedding and summed directions
(rope=True, average=False in the backbone).
"""

_base_ = ["./upernet_160k.py"]

find_unused_parameters = True  # the classifier's last norm has no use here
sync_bn = "torch"  # the backbone's batch norm too
model = dict(
    backbone=dict(_delete_=True, type="VimSegBackbone", img_size=512, drop_path_rate=0.1),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=8)  # per process, of four
train_cfg = dict(max_iters=60_000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=60_000),
]
auto_scale_lr = dict(base_batch_size=32)

# As published, one-dimensional parameters and biases do not decay; here the scans' have a dimension for the directions.
# The published layer decay did not know the names of Vim's blocks, so that all but the stem and the position embedding
# learn at the full rate. A configuration on top gives their factor.
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            "model.stem.conv.bias": dict(decay_mult=0.0),
            "ssm.D": dict(decay_mult=0.0),
            "ssm.dt_bias": dict(decay_mult=0.0),
        },
    ),
)
