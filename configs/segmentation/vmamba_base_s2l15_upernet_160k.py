"""UPerNet on VMamba-B (s2l15), ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="vmamba_base_s2l15", pretrained="vmamba_base_s2l15.in1k", drop_path_rate=0.6),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
