"""RetinaNet on EfficientVMamba-S, COCO, 12 epochs.

The paper has its results; a configuration was not published.
"""

_base_ = ["../_base_/retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_small", pretrained="efficientvmamba_small.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[128, 256, 512]),
)

optim_wrapper = dict(type="AmpOptimWrapper")
