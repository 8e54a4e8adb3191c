"""UPerNet on EfficientVMamba-S, ADE20K, 160,000 steps.

The paper has its results; a configuration was not published. The head's width is what the parameters add up to.
"""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_small", pretrained="efficientvmamba_small.in1k", drop_path_rate=0.1),
    decode_head=dict(in_channels=[64, 128, 256, 512], channels=384),
    auxiliary_head=dict(in_channels=256),
)
