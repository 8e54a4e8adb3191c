"""The optional packages of detection and segmentation, and what to do when one is missing."""

import importlib
from types import ModuleType

from vmamba.errors import UserError


class MissingPackage(UserError, ImportError):
    """A package that is not installed, or lacks its compiled part; the message is one line."""


def require(module: str) -> ModuleType:
    """Imports a module of one of the optional packages.

    Raises:
        MissingPackage: if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{module} cannot be imported ({error}): detection and segmentation need the packages of "
            "pip install 'vmamba[mm]', of which MMCV is compiled; see the README"
        ) from error
