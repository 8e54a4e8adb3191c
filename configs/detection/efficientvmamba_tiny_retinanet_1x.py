"""RetinaNet on EfficientVMamba-T, COCO, 12 epochs.

The paper has its results; a configuration was not published.
"""

_base_ = ["../_base_/retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_tiny", pretrained="efficientvmamba_tiny.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384]),
)

optim_wrapper = dict(type="AmpOptimWrapper")
