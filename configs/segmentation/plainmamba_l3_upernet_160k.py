"""UPerNet on PlainMamba-L3, ADE20K, 160,000 steps."""

_base_ = ["../_base_/plainmamba_upernet_160k.py"]

model = dict(
    backbone=dict(
        model_name="plainmamba_l3", pretrained="plainmamba_l3.in1k", drop_path_rate=0.3, out_indices=(8, 17, 26, 35)
    ),
    decode_head=dict(in_channels=[448, 448, 448, 448]),
    auxiliary_head=dict(in_channels=448),
)
