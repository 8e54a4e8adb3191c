"""UPerNet on Spatial-Mamba-T, ADE20K, 160,000 steps."""

_base_ = ["../_base_/spatialmamba_upernet_160k.py"]

model = dict(
    backbone=dict(model_name="spatialmamba_tiny", pretrained="spatialmamba_tiny.in1k", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
