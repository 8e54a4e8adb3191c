"""Trains a detector or segmentor from a checkout: the same as `vmamba train-dense`, also under torchrun.

python tools/train_dense.py digits_mask_rcnn
torchrun --nproc-per-node 8 tools/train_dense.py configs/detection/vmamba_tiny_s1l8_mask_rcnn_1x.py --amp
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train-dense", *sys.argv[1:]]))
