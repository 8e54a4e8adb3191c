"""What the backbones for MMEngine share: a timm model inside, strict weights, frozen stages."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import timm
from mmengine.model import BaseModule
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn

from vmamba.errors import UserError, nearest
from vmamba.mm.checkpoints import InitCfg, accept_published, load_pretrained, pretrained_source, registered
from vmamba.models._hierarchical import HierarchicalBackbone


def rising(indices: Sequence[int], count: int) -> list[int]:
    """Indices of some of ``count`` stages or blocks, as a list.

    Raises:
        UserError: if there are none, or they do not rise or go beyond.
    """
    if not indices or list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= count:
        raise UserError(f"out_indices must rise from 0 to at most {count - 1}, got {tuple(indices)}")
    return list(indices)


class DenseBackbone(BaseModule):
    """A model of this package under ``model``, giving maps (batch, channels, height, width) for necks and heads.

    Subclasses add what stands between the model and the maps.

    Args:
        model_name: A registered model, such as ``"vmamba_tiny_s1l8"``.
        frozen_stages: How much of the model does not learn and stays in eval mode: nothing for -1, the stem (and the
            position embedding) for 0, and that many stages, or blocks of a model of one scale, beside it.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0 at the first.
        with_cp: Whether to trade time for memory: blocks keep their input only and run again in the backward pass.
        pretrained: Weights of the model that :meth:`init_weights` loads: None for none, True for the model's own, a
            name such as ``"vmamba_tiny_s1l8.in1k"``, a file or a URL.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` says the same as ``pretrained``.
        **model_kwargs: For the model.

    Attributes:
        channels: Channels of the maps; also ``num_features``.

    Raises:
        UserError: for an unknown model, arguments it does not take, or contradicting weights.
    """

    model_type: ClassVar[type[nn.Module]]
    """The models it takes."""

    own_parts: ClassVar[str]
    """Pattern of the published names of what is not the model."""

    model_prefix: ClassVar[str] = ""
    """What the published names of the model begin with."""

    channels: list[int]

    def __init__(
        self,
        model_name: str,
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        pretrained: str | bool | None = None,
        init_cfg: InitCfg = None,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if "num_classes" in model_kwargs:
            raise UserError(f"backbone '{model_name}' has no classifier; give num_classes to the heads")
        self.model_name = model_name
        self.model_kwargs = {"drop_path_rate": drop_path_rate, **model_kwargs}
        self.pretrained = pretrained_source(pretrained, init_cfg)
        self.model = self._build()
        self.model.set_grad_checkpointing(with_cp)
        self.frozen = self._freeze(frozen_stages)
        self.activating_norms = [name for name, x in self.model.named_modules() if isinstance(x, BatchNormAct2d)]
        self.register_load_state_dict_pre_hook(accept_published)

    def _build(self) -> Any:
        """The model, without a classifier."""
        known = registered()
        if self.model_name not in known:
            raise UserError(
                f"unknown model '{self.model_name}': expected one that vmamba models lists"
                f"{nearest(self.model_name, known)}"
            )
        family = type(timm.create_model(self.model_name, device="meta"))
        if not issubclass(family, self.model_type):
            raise UserError(
                f"{type(self).__name__} takes a {self.model_type.__name__}, and '{self.model_name}' is a "
                f"{family.__name__}"
            )
        try:
            return self.create_model()
        except TypeError as error:
            raise UserError(
                f"'{self.model_name}' cannot be built: {error}; a config that takes over another backbone's dict must "
                "leave that one's arguments out with _delete_=True"
            ) from None

    def create_model(self, **kwargs: Any) -> Any:
        """The model whole, but for its classifier; ``kwargs`` are for timm's ``create_model``."""
        return timm.create_model(self.model_name, num_classes=0, **kwargs, **self.model_kwargs)

    # -- Weights ------------------------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Loads ``pretrained``; without it, all stays as the constructor drew it.

        Raises:
            CheckpointError: if the weights cannot be read or are not the model's.
        """
        if self.pretrained is not None:
            load_pretrained(self, self.pretrained)
        self.is_init = True

    def own_name(self, key: str) -> str:
        """The name here of a published one that ``own_parts`` matches."""
        return key

    @property
    def filter_fn(self) -> Callable[[dict[str, Any], Any], dict[str, Tensor]]:
        """What turns the model's published weights into this package's."""
        return sys.modules[timm.model_entrypoint(self.model_name).__module__].checkpoint_filter_fn

    # -- Training -----------------------------------------------------------------------------------------------------

    def _freeze(self, stages: int) -> list[nn.Module]:
        """The modules that do not learn."""
        if stages < 0:
            return []
        units: Sequence[nn.Module] = list(self._units().children())
        if stages > len(units):
            raise UserError(f"frozen_stages is {stages}, but '{self.model_name}' has {len(units)}")
        frozen = [self.model.stem, *units[:stages]]
        for module in frozen:
            module.requires_grad_(False)
        for name in ("pos_embed", "cls_token", "cls_pos_embed"):
            if getattr(self.model, name, None) is not None:
                getattr(self.model, name).requires_grad_(False)
        return frozen

    def _units(self) -> nn.Module:
        """What ``frozen_stages`` counts."""
        return self.model.stages if isinstance(self.model, HierarchicalBackbone) else self.model.blocks

    def train(self, mode: bool = True) -> "DenseBackbone":
        """Training mode for all that learns.

        Raises:
            UserError: if batch norms were replaced by synchronised ones and lost the activations that timm puts there.
        """
        super().train(mode)
        for name in self.activating_norms:
            if not isinstance(self.model.get_submodule(name), BatchNormAct2d | SyncBatchNormAct):
                raise UserError(
                    f"sync_bn replaced the norm '{name}' of '{self.model_name}', which is also its activation: leave "
                    "sync_bn out, and convert the model with timm.layers.convert_sync_batchnorm"
                )
        for module in self.frozen:
            module.eval()
        return self

    # -- Inference ----------------------------------------------------------------------------------------------------

    @property
    def num_features(self) -> list[int]:
        """Channels of the maps, by another name that necks are told."""
        return self.channels

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (batch, C, H, W) to maps (batch, channels, height, width), the finest first.

        Raises:
            UserError: for images that have no pixels, or other channels than the model.
        """
        if images.dim() != 4 or not images.numel() or images.shape[1] != self.model.in_chans:
            raise UserError(
                f"images are of shape {tuple(images.shape)}, but '{self.model_name}' takes (batch, "
                f"{self.model.in_chans}, height, width) with at least one pixel"
            )
        return self.maps(images)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """:meth:`forward`, for images that are known to fit."""
        raise NotImplementedError
