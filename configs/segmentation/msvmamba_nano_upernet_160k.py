"""UPerNet on MSVMamba-N, ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="msvmamba_nano", pretrained="msvmamba_nano.in1k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[48, 96, 192, 384]),
    auxiliary_head=dict(in_channels=192),
)
