"""UPerNet on Vim-Ti, ADE20K, 60,000 steps."""

_base_ = ["../_base_/vim_upernet_60k.py"]

model = dict(
    backbone=dict(model_name="vim_tiny_patch16_224", pretrained="vim_tiny_patch16_224.in1k"),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
)

slow = dict(lr_mult=0.92**25)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        custom_keys={"model.stem.conv.weight": slow, "model.stem.conv.bias": slow, "model.pos_embed": slow}
    ),
)
