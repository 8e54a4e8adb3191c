"""UPerNet on ADE20K, 160,000 steps on crops of 512x512: what the hierarchical backbones share.

A configuration on top names the backbone, its pretrained weights, its drop path and its channels.
"""

# "mmseg::" would look for a distribution called mmsegmentation, which OneDL's fork is not; a path finds both.
_base_ = [
    f"{__import__('mmseg').__path__[0]}/.mim/configs/_base_/models/upernet_r50.py",
    "./ade20k.py",
    "./adamw_160k.py",
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,  # ResNet's
    backbone=dict(_delete_=True, type="MambaBackbone", out_indices=(0, 1, 2, 3), out_norm=True),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
