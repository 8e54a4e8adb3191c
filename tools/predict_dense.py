"""Draws what a detector or segmentor finds on images: the same as `vmamba predict-dense`.

python tools/predict_dense.py digits_mask_rcnn runs/digits_mask_rcnn/epoch_3.pth data/digit_scenes/images/validation
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict-dense", *sys.argv[1:]]))
