"""Tests a detector or segmentor from a checkout: the same as `vmamba test-dense`, also under torchrun.

python tools/test_dense.py digits_upernet runs/digits_upernet/epoch_10.pth --tta
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["test-dense", *sys.argv[1:]]))
