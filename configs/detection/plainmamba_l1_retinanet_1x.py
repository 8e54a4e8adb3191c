"""RetinaNet on PlainMamba-L1 with its adapter, COCO, 12 epochs."""

_base_ = ["../_base_/plainmamba_retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="plainmamba_l1", pretrained="plainmamba_l1.in1k", drop_path_rate=0.1),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
