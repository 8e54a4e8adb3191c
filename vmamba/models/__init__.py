"""The model families; importing this package registers them with timm."""

from vmamba.models.efficientvmamba import EfficientVMamba
from vmamba.models.msvmamba import MSVMamba
from vmamba.models.plainmamba import PlainMamba
from vmamba.models.spatialmamba import SpatialMamba
from vmamba.models.vim import Vim
from vmamba.models.vmamba import VMamba

__all__ = ["EfficientVMamba", "MSVMamba", "PlainMamba", "SpatialMamba", "VMamba", "Vim"]
