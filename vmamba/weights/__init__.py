"""Published weights by name: what there is, where it is, and how it gets here unharmed.

    from vmamba.weights import checkpoints, find, fetch

    find("vmamba_tiny_s1l8.in1k").metrics        # {'top1': 82.6}
    fetch("vmamba_tiny_s1l8_mask_rcnn_1x.coco")  # path of the file, downloaded and checked if it was not here

``timm.create_model("vmamba_tiny_s1l8.in1k", pretrained=True)`` goes the same way. The facts are in ``manifest.yaml``.
"""

from vmamba.weights.fetching import fetch, fetch_into
from vmamba.weights.manifest import Checkpoint, aliases, checkpoints, find

__all__ = ["Checkpoint", "aliases", "checkpoints", "fetch", "fetch_into", "find"]
