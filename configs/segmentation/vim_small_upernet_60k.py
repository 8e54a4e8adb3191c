"""UPerNet on Vim-S, ADE20K, 60,000 steps."""

_base_ = ["../_base_/vim_upernet_60k.py"]

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", pretrained="vim_small_patch16_224.in1k"),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)

slow = dict(lr_mult=0.95**25)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={"model.stem.conv.weight": slow, "model.stem.conv.bias": slow, "model.pos_embed": slow}
    ),
)
