"""UPerNet on EfficientVMamba-B, ADE20K, 160,000 steps.

The paper has its results; a configuration was not published.
"""

_base_ = ["../_base_/upernet_160k.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_base", pretrained="efficientvmamba_base.in1k", drop_path_rate=0.1),
)
