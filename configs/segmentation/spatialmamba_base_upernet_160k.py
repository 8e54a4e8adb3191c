"""UPerNet on Spatial-Mamba-B, ADE20K, 160,000 steps."""

_base_ = ["../_base_/spatialmamba_upernet_160k.py"]

model = dict(
    backbone=dict(model_name="spatialmamba_base", pretrained="spatialmamba_base.in1k", drop_path_rate=0.5),
)
