"""UPerNet on MSVMamba-T, ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="msvmamba_tiny", pretrained="msvmamba_tiny.in1k", drop_path_rate=0.2),
)
