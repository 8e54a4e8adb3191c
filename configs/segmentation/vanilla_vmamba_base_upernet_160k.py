"""UPerNet on vanilla VMamba-B, ADE20K, 160,000 steps.

The published one started from weights that are listed no longer (drop path 0.5, 83.2 % top-1).
"""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="vanilla_vmamba_base", pretrained="vanilla_vmamba_base.in1k", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
