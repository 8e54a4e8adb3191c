"""The scripts that make pages are no package; they are found as mkdocs finds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
