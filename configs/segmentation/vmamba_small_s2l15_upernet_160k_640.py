"""UPerNet on VMamba-S (s2l15), ADE20K, 160,000 steps on crops of 640x640."""

_base_ = ["../_base_/upernet_160k_640.py"]

model = dict(
    backbone=dict(model_name="vmamba_small_s2l15", pretrained="vmamba_small_s2l15.in1k", drop_path_rate=0.3),
)
