"""RetinaNet on EfficientVMamba-B, COCO, 12 epochs.

The paper has its results; a configuration was not published.
"""

_base_ = ["../_base_/retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="efficientvmamba_base", pretrained="efficientvmamba_base.in1k", drop_path_rate=0.1),
)

optim_wrapper = dict(type="AmpOptimWrapper")
