"""Vision-Mamba backbones on one selective scan, behind timm's interface.

Importing the package registers every model with timm, so that ``timm.create_model("vmamba_tiny_s1l8")`` works.
"""

from vmamba import models as models
from vmamba.ops import backend_info as backend_info

__version__ = "0.1.0"
