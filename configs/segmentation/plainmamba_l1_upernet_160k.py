"""UPerNet on PlainMamba-L1, ADE20K, 160,000 steps."""

_base_ = ["../_base_/plainmamba_upernet_160k.py"]

model = dict(
    backbone=dict(model_name="plainmamba_l1", pretrained="plainmamba_l1.in1k", drop_path_rate=0.1),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
