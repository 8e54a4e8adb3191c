"""UPerNet on EfficientVMamba-T, ADE20K, 160,000 steps.

The paper has its results; a configuration was not published. The head's width is what the parameters add up to.
"""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", pretrained="efficientvmamba_tiny.in1k", drop_path_rate=0.1),
    decode_head=dict(in_channels=[48, 96, 192, 384], channels=256),
    auxiliary_head=dict(in_channels=192),
)
