"""Backbones for MMEngine: detection with MMDetection, segmentation with MMSegmentation.

A config needs one line, ``custom_imports = dict(imports=["vmamba.mm"])``: the backbones are registered on MMEngine's
root registry, where MMDetection and MMSegmentation both look.

    MambaBackbone          every family of four stages
    VimSegBackbone         Vim with its four maps for segmentation
    VimDetBackbone         Vim with its pyramid for detection
    PlainMambaSegBackbone  PlainMamba's maps for segmentation
    PlainMambaAdapter      PlainMamba with its adapter for detection

Beside them, two optimiser constructors (:mod:`vmamba.mm.optim`) and a norm of ViTDet's heads (:mod:`vmamba.mm.norm`).

MMEngine alone is needed to import this; the adapter needs MMCV's operators too.
"""

from vmamba.mm.packages import require

require("mmengine")

from vmamba.mm import norm, optim  # noqa: E402, F401  (they register what they have)
from vmamba.mm.hierarchical import MambaBackbone  # noqa: E402
from vmamba.mm.plainmamba import PlainMambaSegBackbone  # noqa: E402
from vmamba.mm.plainmamba_adapter import PlainMambaAdapter  # noqa: E402
from vmamba.mm.vim import VimDetBackbone, VimSegBackbone  # noqa: E402

__all__ = ["MambaBackbone", "PlainMambaAdapter", "PlainMambaSegBackbone", "VimDetBackbone", "VimSegBackbone"]
