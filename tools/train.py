"""Trains from a checkout: the same as `vmamba train`, also under torchrun.

torchrun --nproc-per-node 8 tools/train.py --config vmamba_tiny_s1l8 --data /data/imagenet
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
