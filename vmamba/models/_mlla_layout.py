"""How MLLA's code names its stem and downsampling; families that took them over publish the same names."""

from vmamba.models._checkpoint import Names

NAMES: Names = {
    r"^patch_embed\.(.+)\.norm\.": r"stem.\1.bn.",
    r"^patch_embed\.": "stem.",
    # Published stages end with their downsampling, ours begin with it.
    r"^layers\.(\d+)\.downsample\.conv\.": lambda match: f"stages.{int(match[1]) + 1}.downsample.conv.",
    r"\.downsample\.conv\.0\.conv\.": ".downsample.expand.",
    r"\.downsample\.conv\.1\.conv\.": ".downsample.conv.",
    r"\.downsample\.conv\.2\.conv\.": ".downsample.project.",
    r"\.downsample\.conv\.2\.norm\.": ".downsample.norm.",
    r"^layers\.(\d+)\.blocks\.": r"stages.\1.blocks.",
    r"^head\.": "head.fc.",
}
"""What a model of :class:`vmamba.layers.ResidualConvStem` and :class:`vmamba.layers.InvertedDownsample` calls them."""
