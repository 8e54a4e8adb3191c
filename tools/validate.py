"""Validates from a checkout: the same as `vmamba validate`, also under torchrun.

python tools/validate.py --model vmamba_tiny_s1l8 --pretrained --data /data/imagenet --batch-size 256
"""

import sys

from vmamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
