"""Mask R-CNN on Vim-B, COCO, 100 epochs."""

_base_ = ["../_base_/vim_mask_rcnn_100ep.py"]

model = dict(
    backbone=dict(model_name="vim_base_patch16_224", pretrained="vim_base_patch16_224.in1k"),
)
