"""UPerNet on vanilla VMamba-T, ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_tiny", pretrained="vanilla_vmamba_tiny.in1k", drop_path_rate=0.3),
)
