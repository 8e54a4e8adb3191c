"""Parameters and operations of whole detectors and segmentors; seconds each, on any machine.

python tools/flops_dense.py configs/detection/vmamba_tiny_s1l8_mask_rcnn_1x.py configs/segmentation/*.py
"""

import sys

from vmamba.mm.flops import main

if __name__ == "__main__":
    sys.exit(main())
