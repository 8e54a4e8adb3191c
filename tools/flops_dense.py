"""Parameters and operations of whole detectors and segmentors from a checkout: the same as `vmamba flops-dense`.

python tools/flops_dense.py vmamba_tiny_s1l8_mask_rcnn_1x configs/segmentation/*.py
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["flops-dense", *sys.argv[1:]]))
