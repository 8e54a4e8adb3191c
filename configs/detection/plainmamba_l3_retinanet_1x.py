"""RetinaNet on PlainMamba-L3 with its adapter, COCO, 12 epochs."""

_base_ = ["../_base_/plainmamba_retinanet_1x.py"]

model = dict(
    backbone=dict(model_name="plainmamba_l3", pretrained="plainmamba_l3.in1k", drop_path_rate=0.3),
    neck=dict(in_channels=[448, 448, 448, 448]),
)
