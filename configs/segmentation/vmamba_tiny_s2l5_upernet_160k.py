"""UPerNet on VMamba-T (s2l5), ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="vmamba_tiny_s2l5", pretrained="vmamba_tiny_s2l5.in1k", drop_path_rate=0.2),
)
