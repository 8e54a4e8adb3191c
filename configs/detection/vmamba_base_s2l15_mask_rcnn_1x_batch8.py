"""Mask R-CNN on VMamba-B (s2l15), COCO, 12 epochs with eight images a step: one for each of eight processes."""

_base_ = ["./vmamba_base_s2l15_mask_rcnn_1x.py"]

train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
