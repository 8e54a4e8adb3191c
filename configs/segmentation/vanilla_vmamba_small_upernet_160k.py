"""UPerNet on vanilla VMamba-S, ADE20K, 160,000 steps."""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_small", pretrained="vanilla_vmamba_small.in1k", drop_path_rate=0.3),
)
