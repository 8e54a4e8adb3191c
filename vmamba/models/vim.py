"""Vim: Vision Mamba, Efficient Visual Representation Learning with Bidirectional State Space Model (arXiv 2401.09417).

One scale: the patches of the image, row by row, form one sequence with a class token in its middle, and every block
scans it forwards and backwards. Each direction has a causal convolution of its own, and reads what it scans, its step
sizes, B and C from the result; the gate and both projections are shared.

Between blocks go two streams: ``hidden``, what the last mixer returned, and ``residual``, the sum of all before, kept
in float32 whatever the activations are. The published code and weights are under the Apache-2.0 licence
(github.com/hustvl/Vim). The dense models that its authors trained take the sequence without class token, turn it by a
rotary embedding before every block, or read ``hidden``, ``residual`` or their sum: see :class:`Vim` and
:meth:`Vim.forward_intermediates`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, apply_rot_embed, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, named_apply, register_model, register_notrace_module
from torch import Tensor, nn

from vmamba.layers import Conv2dNHWC, SelectiveSSM, dt_rank
from vmamba.layers.stem import to_nhwc
from vmamba.models._builder import build_model, imagenet_cfg, published_cfgs, published_top1
from vmamba.models._checkpoint import StateDict, rename, unwrap
from vmamba.models._plain import PlainBackbone, fit_pos_embed, resize_pos_embed, square_map
from vmamba.ops import depthwise_conv, get_route
from vmamba.ops.alignment import align_rows

__all__ = ["Vim"]  # timm adds the entry points

Place = Literal["middle", "first"]
"""Where the class token stands in the sequence."""

Feature = Literal["sum", "hidden", "residual"]
"""What a dense model may read behind a block: the sum of both streams, or one of them."""


# ---------------------------------------------------------------------------------------------------------------------
# Sequence
# ---------------------------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Patches, which overlap where the stride is less than their side: (batch, C, H, W) to (batch, rows, columns, dim).

    Last rows and columns of the image that fill no patch are not seen.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the map.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int = 16,
        stride: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.reduction = stride
        self.conv = Conv2dNHWC(in_chans, dim, kernel_size=patch_size, stride=stride, device=device, dtype=dtype)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image."""
        rows, columns = ((side - self.patch_size) // self.reduction + 1 for side in (height, width))
        return rows, columns

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(to_nhwc(image))


def class_index(patches: int, place: Place) -> int:
    """Where the class token stands in a sequence of so many patches and itself."""
    return patches // 2 if place == "middle" else 0


def insert(sequence: Tensor, token: Tensor, index: int) -> Tensor:
    """The sequence (batch, L, dim) with the token (1, 1, dim) at ``index``: (batch, L + 1, dim)."""
    token = token.to(sequence.dtype).expand(sequence.shape[0], -1, -1)
    return torch.cat([sequence[:, :index], token, sequence[:, index:]], dim=1)


def remove(sequence: Tensor, index: int) -> Tensor:
    """The sequence (batch, L, dim) without its token at ``index``."""
    return torch.cat([sequence[:, :index], sequence[:, index + 1 :]], dim=1)


@torch.fx.wrap
def rotation(
    height: int, width: int, dim: int, still: int | None, device: torch.device | str, trained_side: int = 14
) -> Tensor:
    """Sine and cosine of the rotary embedding of a grid, (2, height * width, dim) in float32.

    Neighbouring pairs of channels turn by one angle: in the first half of the channels it grows with the row, in the
    second with the column, in dim / 4 frequencies each. Coordinates are stretched to a grid of ``trained_side``.

    Args:
        height: Rows.
        width: Columns.
        dim: Channels, a multiple of four.
        still: Where the sequence has a token more, that is not turned; None for nowhere.
        device: Where to make them.
        trained_side: Rows and columns of the grid whose coordinates are 0, 1, 2, ...
    """
    half = dim // 2
    frequencies = 10000 ** (-torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)

    def angles(side: int) -> Tensor:
        coordinates = torch.arange(side, device=device, dtype=torch.float32) / side * trained_side
        return torch.outer(coordinates, frequencies).repeat_interleave(2, dim=-1)

    rows = angles(height).unsqueeze(1).expand(-1, width, -1)
    columns = angles(width).unsqueeze(0).expand(height, -1, -1)
    table = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    if still is not None:
        table = torch.cat([table[:still], table.new_zeros(1, dim), table[still:]])
    return torch.stack([table.sin(), table.cos()])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


@register_notrace_module  # how it computes depends on the device
class BidirectionalConv(nn.Module):
    """Depthwise causal convolutions of a sequence, one for each direction, and SiLU.

    Maps (batch, L, dim) to (batch, 2, L, dim).

    Forwards, a position sees itself and the ``width`` - 1 before it; backwards, itself and the ones after it. There are
    ``weight`` (2, dim, width), its last column the position itself in both directions, and ``bias`` (2, dim).
    """

    def __init__(
        self,
        dim: int,
        width: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, dim, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """PyTorch's initialisation of a convolution."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        behind = self.weight.shape[-1] - 1
        y = depthwise_conv(
            x.unsqueeze(1),  # a map of one row
            self.weight[:, :, None, None],
            self.bias,
            padding=(0, 0, behind, 0),
            activation="silu",
        )
        return y.squeeze(2)


class DirectionalSSM(SelectiveSSM):
    """A selective scan in which every direction has an input of its own: ``u`` is (batch, K, L, D)."""

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Low-rank step sizes (batch, L, K, R), B and C (batch, L, K, N) of ``u`` (batch, K, L, D)."""
        weight = align_rows(self.x_proj.weight.unflatten(0, (self.directions, -1)), u)
        params = torch.einsum("bkld,kpd->blkp", u, weight)
        sizes = [self.rank, self.d_state, self.d_state]
        dt, B, C, _ = params.split([*sizes, weight.shape[1] - sum(sizes)], dim=-1)
        return dt, B, C


class VimMixer(nn.Module):
    """Projection, then per direction convolution, SiLU and scan, their mean gated, projection.

    Maps sequences (batch, L, dim) to the same shape.

    Args:
        dim: Channels of the sequence.
        d_state: States per channel of the scan.
        expand: Channels of the scan per channel of the sequence.
        average: Whether the directions are averaged; otherwise they are summed.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        expand: int = 2,
        average: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        inner = expand * dim
        self.average = average
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv = BidirectionalConv(inner, **dd)
        self.act = nn.SiLU()
        self.ssm = DirectionalSSM(inner, dt_rank(dim), d_state, directions=2, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.ssm(self.conv(x), get_route("bidirectional", 1, x.shape[1], x.device))
        out = self.out_proj((y * self.act(z)).to(z.dtype))
        return out / 2 if self.average else out


class RMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, which is the float32 residual, whatever the parameter's is."""

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Streams(NamedTuple):
    """What goes from block to block.

    Attributes:
        hidden: What the last mixer returned, (batch, L, dim); before the first block, the embedded sequence.
        residual: The sum of all before, (batch, L, dim) in float32; absent before the first block.
        rotation: Sine and cosine, (2, L, dim), by which each block turns the stream first; absent in most models.
    """

    hidden: Tensor
    residual: Tensor | None = None
    rotation: Tensor | None = None

    def read(self, feature: Feature) -> Tensor:
        """One stream or the sum of both, behind a block: (batch, L, dim).

        Raises:
            ValueError: for a feature of another name.
        """
        assert self.residual is not None
        if feature == "hidden":
            return self.hidden
        if feature == "residual":
            return self.residual
        if feature == "sum":
            return self.residual + self.hidden
        raise ValueError(f"feature must be one of {', '.join(get_args(Feature))}, got '{feature}'")


class VimBlock(nn.Module):
    """Adds ``hidden`` to ``residual``; the new ``hidden`` is the mixer of the normalised sum.

    Args:
        dim: Channels of the sequence.
        mixer: The mixer.
        drop_path: Probability of dropping the incoming ``hidden``, per image.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, streams: Streams) -> Streams:
        hidden, residual, turn = streams
        residual = hidden.float() if residual is None else residual + self.drop_path(hidden)
        if turn is not None:
            residual = apply_rot_embed(residual, turn[0], turn[1])
        return Streams(self.mixer(self.norm(residual).to(hidden.dtype)), residual, turn)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class TokenPool(nn.Module):
    """From tokens (batch, L, dim) to (batch, dim): the class token, or the mean or maximum of the patches.

    Args:
        pool_type: ``"token"``, ``"avg"``, ``"max"``, or ``""`` for the tokens as they are.
        class_token: Where the class token stands; None if there is none.
    """

    def __init__(self, pool_type: str, class_token: Place | None) -> None:
        super().__init__()
        known = ("avg", "max", "") if class_token is None else ("token", "avg", "max", "")
        if pool_type not in known:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, known))}, got '{pool_type}'")
        self.pool_type = pool_type
        self.class_token = class_token

    def feat_mult(self) -> int:
        """Features of the result per channel."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.pool_type:
            return x
        if self.class_token is not None:
            index = class_index(x.shape[1] - 1, self.class_token)
            if self.pool_type == "token":
                return x[:, index]
            x = remove(x, index)
        return x.mean(1) if self.pool_type == "avg" else x.amax(1)


class VimHead(nn.Module):
    """Pooling of tokens, dropout, linear classifier; see :class:`TokenPool` for the pooling."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        pool_type: str,
        class_token: Place | None,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.global_pool = TokenPool(pool_type, class_token)
        self.drop = nn.Dropout(drop_rate)
        self.fc = self._classifier(num_classes, device=device, dtype=dtype)

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        return nn.Linear(self.in_features, num_classes, **dd) if num_classes else nn.Identity()

    def reset(self, num_classes: int, pool_type: str | None = None) -> None:
        """A new classifier, and a new pooling if one is named."""
        if pool_type is not None:
            self.global_pool = TokenPool(pool_type, self.global_pool.class_token)
        self.fc = self._classifier(num_classes)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


def init_symmetric(module: nn.Module, name: str) -> None:
    """Draws a module's parameters anew; both directions of the scans start alike."""
    if isinstance(module, PatchEmbed):
        # LeCun's; timm's function of that name truncates at two standard deviations, the published one at 2.
        trunc_normal_(module.conv.weight, std=module.conv.weight[0].numel() ** -0.5 / 0.87962566103423978)
        assert module.conv.bias is not None
        nn.init.zeros_(module.conv.bias)
    elif isinstance(module, VimHead) and isinstance(module.fc, nn.Linear):
        trunc_normal_(module.fc.weight, std=0.02)
        nn.init.zeros_(module.fc.bias)
    elif isinstance(module, Vim) and module.cls_token is not None:
        trunc_normal_(module.cls_token, std=0.02)
        trunc_normal_(module.cls_pos_embed, std=0.02)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()


def init_published(module: nn.Module, name: str) -> None:
    """As the published models start: :func:`init_symmetric`, but with the backward step sizes at softplus(0) = 0.69.

    The published code shields the special bias of the forward steps from being zeroed with those of all other linear
    layers, and forgets the backward one.
    """
    init_symmetric(module, name)
    if isinstance(module, SelectiveSSM):
        nn.init.zeros_(module.dt_bias[1])


def init_legacy(module: nn.Module, name: str) -> None:
    """As the first release starts: all linear layers normal (std 0.02) with zero bias, those of the steps included."""
    if isinstance(module, SelectiveSSM):
        module.reset_parameters()
        trunc_normal_(module.x_proj.weight, std=0.02)
        trunc_normal_(module.dt_weight, std=0.02)
        nn.init.zeros_(module.dt_bias)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Vim) and module.cls_token is not None:
        nn.init.zeros_(module.cls_token)
        trunc_normal_(module.cls_pos_embed, std=0.02)
    elif not isinstance(module, PatchEmbed | VimHead | Vim):
        init_symmetric(module, name)


class Vim(PlainBackbone):
    """Vision Mamba with timm's interface; see :class:`PlainBackbone` for the arguments not listed.

    Args:
        global_pool: ``"token"``, ``"avg"``, ``"max"`` or ``""``; by default the class token, or without one the mean.
        depth: Blocks.
        embed_dim: Channels.
        d_state: States per channel of the scans.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next.
        class_token: Where the class token stands, ``"middle"`` or ``"first"``; ``"none"`` for none, as in dense models
            (a word, since timm's ``create_model`` passes no None on).
        average: Whether the directions are averaged; otherwise they are summed.
        rope: Whether a rotary embedding of the grid turns the stream before every block.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        init_fn: Draws the parameters of a module, called with (module, name), children first.
        published_resize: Whether a checkpoint's position embedding of another size is resized as the published code
            does, which takes the first row for the class token's wherever that stands; the released models of stride 8
            were fine-tuned from such a start.
    """

    output_fmt = "NLC"
    cls_token: Any
    cls_pos_embed: Any

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        patch_size: int = 16,
        stride: int = 16,
        class_token: Literal["middle", "first", "none"] = "middle",
        average: bool = True,
        rope: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_fn: Callable[[nn.Module, str], None] = init_published,
        published_resize: bool = False,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        place: Place | None = None if class_token == "none" else class_token
        pool = ("avg" if place is None else "token") if global_pool is None else global_pool
        super().__init__(
            PatchEmbed(in_chans, embed_dim, patch_size, stride, **dd),
            # Each block drops what the one before it returned; the last one's output is dropped in leave().
            [
                VimBlock(embed_dim, VimMixer(embed_dim, d_state, average=average, **dd), rate, **dd)
                for rate in [0.0, *rates[:-1]]
            ],
            RMSNorm(embed_dim, **dd),
            VimHead(embed_dim, num_classes, pool, place, drop_rate, **dd),
            dim=embed_dim,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=pool,
            img_size=img_size,
            **dd,
        )
        self.class_token = place
        self.rope = rope
        self.init_fn = init_fn
        self.published_resize = published_resize
        self.drop_path = DropPath(rates[-1]) if rates[-1] else nn.Identity()
        self.cls_token, self.cls_pos_embed = (
            None if place is None else nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) for _ in range(2)
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all parameters anew."""
        super().init_weights()
        named_apply(self.init_fn, self, include_root=True)
        for mixer in (module for module in self.modules() if isinstance(module, VimMixer)):
            bound = (mixer.out_proj.in_features * len(self.blocks)) ** -0.5
            nn.init.uniform_(mixer.out_proj.weight, -bound, bound)

    # -- Inference ----------------------------------------------------------------------------------------------------

    def enter(self, x: Tensor) -> Streams:
        """The sequence of a map of patches (batch, height, width, dim)."""
        height, width = x.shape[1], x.shape[2]
        index = None if self.class_token is None else class_index(height * width, self.class_token)
        turn = rotation(height, width, self.embed_dim, index, x.device) if self.rope else None
        x = x.flatten(1, 2)
        if index is not None:
            x = insert(x, self.cls_token + self.cls_pos_embed, index)
        return Streams(x, None, turn)

    def leave(self, state: Streams) -> Tensor:
        """All tokens (batch, L, dim), normalised, the class token among them."""
        hidden, residual, _ = state
        return self.norm(residual + self.drop_path(hidden)).to(hidden.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        feature: Feature | Sequence[Feature] = "sum",
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the patches behind blocks, without the class token, beside the final tokens.

        Args:
            x: Images (batch, C, H, W).
            indices: Which blocks: the last n for an int, all for None.
            norm: Whether the maps pass the final norm.
            stop_early: Whether to leave out the blocks that no index needs.
            output_fmt: ``"NCHW"``, ``"NHWC"`` or ``"NLC"``, for the maps.
            intermediates_only: Whether to return the list alone.
            feature: What the maps show; one for all, or one for each index. ``"hidden"``: what the block's mixer
                returned. ``"residual"``: what that mixer was given, before the norm; with a rotary embedding, turned.
                ``"sum"``: both together, what the next block adds up.

        Returns:
            The final tokens as :meth:`forward_features` gives them, and the list of maps in the order of the blocks.
        """
        features = self._features_by_index(indices, feature)

        def read(index: int, state: Streams, height: int, width: int) -> Tensor:
            tokens = state.read(features[index])
            if self.class_token is not None:
                tokens = remove(tokens, class_index(height * width, self.class_token))
            tokens = self.norm(tokens) if norm else tokens
            return tokens.to(state.hidden.dtype).unflatten(1, (height, width))

        return self._intermediates(x, indices, read, stop_early, output_fmt, intermediates_only)

    def _features_by_index(
        self, indices: int | list[int] | None, feature: Feature | Sequence[Feature]
    ) -> dict[int, Feature]:
        taken, _ = self.take_indices(indices)
        features = [feature] * len(taken) if isinstance(feature, str) else list(feature)
        if len(features) != len(taken):
            raise ValueError(f"feature must be one name or one for each of {len(taken)} indices, got {len(features)}")
        return dict(zip(taken, features, strict=True))

    # -- Training -----------------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Position embeddings, class token, and the skips and step biases of the scans, as in published training."""
        steps = {name for name, _ in self.named_parameters() if name.endswith(".dt_bias")}
        token = set() if self.class_token is None else {"cls_token", "cls_pos_embed"}
        return super().no_weight_decay() | steps | token

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order the parameters by depth, for layer-wise learning rates; there is one grain."""
        return {**super().group_matcher(coarse), "stem": r"^(?:stem|pos_embed|cls_token|cls_pos_embed)"}


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints
# ---------------------------------------------------------------------------------------------------------------------

_WRAPPERS = ("state_dict_ema", "model", "state_dict", "model_ema")
"""Published files hold an average beside the weights; the published accuracies are those of the weights themselves."""

_NAMES = {
    r"^patch_embed\.proj\.": "stem.conv.",
    r"^layers\.": "blocks.",
    r"^norm_f\.": "norm.",
    r"^head\.": "head.fc.",
}
_DIRECTIONS = {
    "A_log": ("A_b_log", "ssm.A_log"),
    "D": ("D_b", "ssm.D"),
    "conv1d.weight": ("conv1d_b.weight", "conv.weight"),
    "conv1d.bias": ("conv1d_b.bias", "conv.bias"),
    "x_proj.weight": ("x_proj_b.weight", "ssm.x_proj.weight"),
    "dt_proj.weight": ("dt_proj_b.weight", "ssm.dt_weight"),
    "dt_proj.bias": ("dt_proj_b.bias", "ssm.dt_bias"),
}
"""The forward direction's published parameters, the backward one's, and both together here."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> StateDict:
    """Turns a published checkpoint into this package's names and shapes; own ones keep theirs.

    The position embedding is resized to the model's grid (see ``published_resize`` of :class:`Vim`). A model without
    class token takes a checkpoint that has one, and leaves the token out. Tables of a rotary embedding are not read:
    the model computes its own, for any grid.

    Args:
        state_dict: Weights under published or own names, bare or in their wrapper.
        model: The :class:`Vim` they are for.
    """
    weights = unwrap(state_dict, _WRAPPERS)
    if any(key.startswith(("patch_embed.", "layers.")) for key in weights):
        place: Place = "first" if any(key.startswith("rope.") for key in weights) else "middle"
        weights = {key: value for key, value in weights.items() if not key.startswith("rope.")}
        weights = _split_positions(_join_directions(weights), place, model)
        weights = {rename(key, _NAMES): value for key, value in weights.items()}
    if model.class_token is None:
        weights = {key: value for key, value in weights.items() if key not in ("cls_token", "cls_pos_embed")}
    return fit_pos_embed(weights, model)


def _join_directions(weights: StateDict) -> StateDict:
    """The weights, with the parameters of both directions of each scan in one tensor, forwards first."""
    joined = dict(weights)
    for key, forwards in weights.items():
        layer, mixer, name = key.rpartition("mixer.")
        if not mixer or name not in _DIRECTIONS:
            continue
        other, both = _DIRECTIONS[name]
        backwards = weights.get(f"{layer}mixer.{other}")
        if backwards is None or backwards.shape != forwards.shape:
            continue  # the comparison with the model names what does not fit
        del joined[key], joined[f"{layer}mixer.{other}"]
        pair = [x.squeeze(1) if name == "conv1d.weight" else x for x in (forwards, backwards)]
        joined[f"{layer}mixer.{both}"] = torch.cat(pair) if name == "x_proj.weight" else torch.stack(pair)
    return joined


def _split_positions(weights: StateDict, place: Place, model: Vim) -> StateDict:
    """The weights, with the position embedding as a map of the patches and the class token's row beside it."""
    rows = weights.get("pos_embed")
    if rows is None or rows.dim() != 3:
        return weights
    if "cls_token" not in weights:
        return {**weights, "pos_embed": square_map(rows)}
    height, width = model.pos_embed.shape[1:3]
    index = class_index(rows.shape[1] - 1, place)
    if not model.published_resize:
        patches = square_map(remove(rows, index))
    else:
        rows = resize_rows_as_published(rows, height, width)
        index = 0 if model.class_token is None else class_index(height * width, place)
        patches = remove(rows, index).unflatten(1, (height, width))
    return {**weights, "pos_embed": patches, "cls_pos_embed": rows[:, index : index + 1]}


def resize_rows_as_published(rows: Tensor, height: int, width: int, extra: int = 1) -> Tensor:
    """The published resize of a position embedding (1, extra + patches, dim) to (1, extra + height * width, dim).

    It keeps the first row, if one is ``extra``, as the class token's, and resizes the others as a square of patches.
    With the token in the middle, the first half of the map is thereby shifted by one patch, and one cell is the
    token's.
    """
    patches = resize_pos_embed(square_map(rows[:, extra:]), height, width)
    return torch.cat([rows[:, :extra], patches.flatten(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained configurations
# ---------------------------------------------------------------------------------------------------------------------

# The published models carry a mean and deviation of 0.5 and a crop of 0.9, which are not what they were trained and
# evaluated with.
_shared: dict[str, Any] = {"first_conv": "stem.conv", "pool_size": None}
_cfg = partial(imagenet_cfg, license="apache-2.0", **_shared)  # this package's own

PUBLISHED_TOP1 = published_top1("vim_*")
"""ImageNet-1K top-1 accuracy in percent at 224x224, as the authors published it."""

default_cfgs = generate_default_cfgs(
    {
        **published_cfgs("vim_*", **_shared),
        "vim_nano_32.untrained": _cfg(num_classes=10, input_size=(3, 32, 32), crop_pct=1.0),
        "test_vim.untrained": _cfg(input_size=(3, 64, 64)),
        "test_vim_rope.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Entry points
# ---------------------------------------------------------------------------------------------------------------------


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    return build_model(
        Vim,
        variant,
        pretrained,
        checkpoint_filter_fn,
        averaged=False,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **kwargs,
    )


_LEGACY = {"class_token": "first", "average": False, "rope": True, "init_fn": init_legacy}


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7.1 M parameters, 76.1 % top-1."""
    model_args = {"embed_dim": 192}
    return _create_vim("vim_tiny_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, fine-tuned with overlapping patches: 7.3 M parameters, 78.3 % top-1."""
    model_args = {"embed_dim": 192, "stride": 8}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 25.8 M parameters, 80.5 % top-1."""
    model_args = {"embed_dim": 384}
    return _create_vim("vim_small_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, fine-tuned with overlapping patches: 26.0 M parameters, 81.6 % top-1."""
    model_args = {"embed_dim": 384, "stride": 8}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 97.6 M parameters, 81.9 % top-1."""
    model_args = {"embed_dim": 768}
    return _create_vim("vim_base_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_tiny_rope_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """The first release's tiny model: rotary embedding, class token first, directions summed; 73.1 % top-1."""
    model_args = {"embed_dim": 192, **_LEGACY}
    return _create_vim("vim_tiny_rope_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def vim_nano_32(pretrained: bool = False, **kwargs: Any) -> Vim:
    """For 32x32 images such as CIFAR's and for one CPU core: few narrow blocks, patches of 4 pixels. Not published."""
    model_args = {"depth": 4, "embed_dim": 64, "d_state": 4, "patch_size": 4, "stride": 4, "img_size": 32}
    return _create_vim("vim_nano_32", pretrained, **{**model_args, **kwargs})


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """Vim at the smallest size that still has every part, for tests."""
    model_args = {"depth": 4, "embed_dim": 16, "d_state": 4, "patch_size": 4, "stride": 4, "img_size": 64}
    return _create_vim("test_vim", pretrained, **{**model_args, **kwargs})


@register_model
def test_vim_rope(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """The first release at the smallest size that still has every part, for tests."""
    model_args = {"depth": 4, "embed_dim": 16, "d_state": 4, "patch_size": 4, "stride": 4, "img_size": 64, **_LEGACY}
    return _create_vim("test_vim_rope", pretrained, **{**model_args, **kwargs})
