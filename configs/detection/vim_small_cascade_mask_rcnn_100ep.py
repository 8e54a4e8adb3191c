"""Cascade Mask R-CNN on Vim-S, COCO, 100 epochs."""

_base_ = ["../_base_/vim_cascade_mask_rcnn_100ep.py"]

model = dict(
    backbone=dict(model_name="vim_small_patch16_224", pretrained="vim_small_patch16_224.in1k"),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
