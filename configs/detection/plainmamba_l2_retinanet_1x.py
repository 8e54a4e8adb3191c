"""RetinaNet on PlainMamba-L2 with its adapter, COCO, 12 epochs."""

_base_ = ["../_base_/plainmamba_retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="plainmamba_l2", pretrained="plainmamba_l2.in1k", drop_path_rate=0.2),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
