"""UPerNet on PlainMamba-L2, ADE20K, 160,000 steps."""

_base_ = ["../_base_/plainmamba_upernet_160k.py"]

model = dict(
    backbone=dict(model_name="plainmamba_l2", pretrained="plainmamba_l2.in1k", drop_path_rate=0.2),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
