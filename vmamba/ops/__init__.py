"""The operator every family stands on, and the routes it walks."""

from vmamba.ops.depthwise_conv import depthwise_conv
from vmamba.ops.drawing import draw_route
from vmamba.ops.extension import BackendInfo, backend_info
from vmamba.ops.gelu import linear_gelu
from vmamba.ops.layer_norm import add_layer_norm, layer_norm
from vmamba.ops.mlp import mlp
from vmamba.ops.recording import ScanCall, record_scans
from vmamba.ops.reference import selective_scan_reference
from vmamba.ops.routes import (
    DECAY_ONLY,
    check_route,
    get_route,
    grid_table,
    list_routes,
    register_route,
    reverse,
)
from vmamba.ops.selective_scan import selective_scan

__all__ = [
    "DECAY_ONLY",
    "BackendInfo",
    "ScanCall",
    "add_layer_norm",
    "backend_info",
    "check_route",
    "depthwise_conv",
    "draw_route",
    "get_route",
    "grid_table",
    "layer_norm",
    "linear_gelu",
    "list_routes",
    "mlp",
    "record_scans",
    "register_route",
    "reverse",
    "selective_scan",
    "selective_scan_reference",
]
