"""Cascade Mask R-CNN on Vim-Ti, COCO, 100 epochs, with a layer decay of 0.837: the script that was released."""

_base_ = ["../_base_/vim_cascade_mask_rcnn_100ep.py"]

model = dict(
    backbone=dict(model_name="vim_tiny_patch16_224", pretrained="vim_tiny_patch16_224.in1k"),
)

optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.837))
