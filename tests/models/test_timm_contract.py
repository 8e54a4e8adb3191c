"""What timm asks of every model: the cases of its own ``tests/test_models.py``, on this package's models.

What costs little runs on all models (shapes on the meta device); what computes runs on the ``test_*`` variants, one for
each architecture. TorchScript is left out: PyTorch has deprecated it in favour of torch.export (covered in
``test_compilation.py``) and timm is removing it, and scripting would need a second, scriptable path around the Python
that checks and prepares every scan.
"""

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from tests.models.common import ALL, HIERARCHICAL, PLAIN, SMALL, image, seeded

FORWARD_SIDE, BACKWARD_SIDE, FEATURE_SIDE = 160, 128, 96


def own_size(model, batch: int = 1) -> tuple[int, ...]:
    return (batch, *model.default_cfg["input_size"])


@pytest.mark.parametrize("name", SMALL)
def test_forward(name):
    model = seeded(name)
    x = image(1, 3, FORWARD_SIDE, FORWARD_SIDE)

    y = model(x)
    model.set_grad_checkpointing()

    assert y.shape == (1, model.num_classes)
    assert y.isfinite().all()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_backward_reaches_every_parameter(name, checkpointing):
    model = seeded(name, num_classes=42).train()
    model.set_grad_checkpointing(checkpointing)

    y = model(image(2, 3, BACKWARD_SIDE, BACKWARD_SIDE))
    y.mean().backward()

    assert y.shape == (2, 42)
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", SMALL)
def test_grad_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = seeded(name).train()
        model.set_grad_checkpointing(checkpointing)
        model(image(1, 3, 64, 64)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ALL)
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device="meta").eval()
    cfg = model.default_cfg
    x = torch.empty(own_size(model), device="meta")
    features = model.num_features

    unpooled = model.forward_features(x)
    assert cfg["pool_size"] is None or unpooled.shape[1:3] == cfg["pool_size"]
    assert model.forward_head(unpooled, pre_logits=True).shape == (1, model.head_hidden_size)
    assert model(x).shape == (1, cfg["num_classes"])
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert cfg["license"]

    model.reset_classifier(0)
    assert model(x).shape == (1, features)
    model.reset_classifier(0, "")
    assert model(x).shape == unpooled.shape
    model.reset_classifier(7, "avg")
    assert model(x).shape == (1, 7)
    assert model.num_classes == 7


@pytest.mark.parametrize("name", SMALL)
def test_created_without_classifier_or_pooling(name):
    x = image(1, 3, 64, 64)
    model = seeded(name, num_classes=0)
    assert model(x).shape == (1, model.num_features)
    assert seeded(name, num_classes=0, global_pool="")(x).shape == model.forward_features(x).shape
    assert seeded(name, num_classes=3, global_pool="max")(x).shape == (1, 3)


def test_pooling_that_widens():
    model = seeded("test_vmamba", global_pool="catavgmax", num_classes=3)
    assert model.head_hidden_size == 2 * model.num_features
    assert model(image(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", SMALL)
def test_in_chans(name, in_chans):
    assert seeded(name, in_chans=in_chans)(image(1, in_chans, 32, 32)).shape == (1, 1000)


FEATURE_CLASSES = [(name, cls) for name in HIERARCHICAL for cls in ("list", "dict", "hook", "fx", "getter")]
FEATURE_CLASSES += [(name, "getter") for name in PLAIN]  # as for timm's own: blocks hand on sequences, not maps


@pytest.mark.parametrize(("name", "feature_cls"), FEATURE_CLASSES)
def test_features_only(name, feature_cls):
    model = seeded(name, features_only=True, feature_cls=feature_cls)
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()

    features = model(image(1, 3, FEATURE_SIDE, FEATURE_SIDE))
    features = list(features.values()) if isinstance(features, dict) else features

    assert len(features) == len(channels) >= 3
    last_first = feature_cls != "getter"  # the getter returns NCHW, all others the model's own NHWC
    for feature, width, reduction in zip(features, channels, reductions, strict=True):
        height = feature.shape[1] if last_first else feature.shape[2]
        assert feature.shape[-1 if last_first else 1] == width
        assert height == FEATURE_SIDE // reduction
        assert feature.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_feature_info_of_every_model(name):
    model = timm.create_model(name, features_only=True, device="meta")
    side = model.default_cfg["input_size"][-1]
    features = model(torch.empty(1, 3, side, side, device="meta"))
    channel = 1 if isinstance(model, FeatureGetterNet) else 3
    for feature, info in zip(features, model.feature_info.get_dicts(), strict=True):
        height, width = (feature.shape[i] for i in (1, 2, 3) if i != channel)
        assert feature.shape[channel] == info["num_chs"]
        assert height == width
        assert side // info["reduction"] - 1 <= height <= side // info["reduction"]  # less where patches overlap


@pytest.mark.parametrize("out_indices", [(0, 2), (-1,), (3, 1)])
def test_out_indices(out_indices):
    model = seeded("test_vmamba", features_only=True, out_indices=out_indices)
    assert len(model(image(1, 3, 64, 64))) == len(out_indices)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_forward_intermediates(name, checkpointing):
    model = seeded(name)
    model.set_grad_checkpointing(checkpointing)
    x = image(1, 3, FEATURE_SIDE, FEATURE_SIDE)

    final, features = model.forward_intermediates(x, output_fmt="NCHW")
    last = model.forward_intermediates(x, indices=1, output_fmt="NHWC", intermediates_only=True)
    _, first = model.forward_intermediates(x, indices=[0], stop_early=True)

    assert torch.equal(final, model.forward_features(x))
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info]
    assert torch.equal(last[0].permute(0, 3, 1, 2), features[-1])
    assert torch.equal(first[0], features[0])
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NCL")


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_forward_intermediates_of_stages(name):
    model = seeded(name)
    x = image(1, 3, FEATURE_SIDE, FEATURE_SIDE)
    final, last = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC")
    early, first = model.forward_intermediates(x, indices=[0], stop_early=True, output_fmt="NHWC")
    assert torch.equal(last[0], final)
    assert torch.equal(early, first[0])  # no norm fits there


@pytest.mark.parametrize("name", PLAIN)
def test_forward_intermediates_of_blocks(name):
    model = seeded(name)
    x = image(1, 3, FEATURE_SIDE, FEATURE_SIDE)
    tokens, maps = (model.forward_intermediates(x, norm=True, output_fmt=fmt)[1] for fmt in ("NLC", "NHWC"))
    assert all(torch.equal(a, b.flatten(1, 2)) for a, b in zip(tokens, maps, strict=True))
    early, last = model.forward_intermediates(x, indices=[0], norm=True, stop_early=True, output_fmt="NLC")
    assert torch.equal(last[0], tokens[0])
    assert early.shape == model.forward_features(x).shape


@pytest.mark.parametrize("name", SMALL)
def test_prune_intermediate_layers(name):
    model = seeded(name)
    x = image(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)

    kept = model.prune_intermediate_layers([0, 1])
    final, features = model.forward_intermediates(x)

    assert kept == [0, 1]
    assert len(features) == 2
    assert model.num_features == features[1].shape[1]
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert torch.equal(final, model.forward_features(x))
    model.reset_classifier(5, "avg")
    assert model(x).shape == (1, 5)


def traced(model, node: int, train: bool):
    """The model as torchvision's FX extractor sees it, up to its last node."""
    tracer_kwargs = {
        "leaf_modules": list(get_notrace_modules()),
        "autowrap_functions": list(get_notrace_functions()),
    }
    train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=tracer_kwargs)
    nodes = [(train_nodes if train else eval_nodes)[node]]
    return create_feature_extractor(
        model, train_return_nodes=nodes, eval_return_nodes=nodes, tracer_kwargs=tracer_kwargs
    ), nodes[0]


@pytest.mark.parametrize("name", SMALL)
def test_forward_fx(name):
    model = seeded(name)
    graph, node = traced(model, -1, train=False)
    for size in ((64, 64), (33, 47)):
        x = image(1, 3, *size)
        assert torch.equal(graph(x)[node], model(x))


@pytest.mark.parametrize("name", SMALL)
def test_backward_fx(name):
    model = seeded(name, num_classes=42).train()
    graph, node = traced(model, -1, train=True)
    graph.train()
    graph(image(2, 3, 64, 64))[node].mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_optimiser_groups(name):
    model = timm.create_model(name, device="meta")
    names = dict(model.named_parameters())

    optimiser = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)

    assert model.no_weight_decay() <= names.keys()
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(names)
    scales = sorted({group["lr_scale"] for group in optimiser.param_groups})
    blocks = len(model.blocks) if hasattr(model, "blocks") else sum(len(stage.blocks) for stage in model.stages)
    assert len(scales) == blocks + 2  # the stem, each block, and norm with head


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_coarse_groups_are_the_stages(name):
    model = seeded(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(groups) == 1 + len(model.stages) + 1


@pytest.mark.parametrize("name", SMALL)
def test_factory_device_and_dtype(name):
    assert {p.device.type for p in timm.create_model(name, device="meta").parameters()} == {"meta"}
    model = timm.create_model(name, dtype=torch.bfloat16).eval()
    kept = {key for key, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {f"{key}.{p}" for key in ssm_names(model) for p in ("dt_weight", "dt_bias", "A_log", "D")}
    x = image(1, 3, 64, 64).bfloat16()
    for other in (model, timm.create_model(name).eval().bfloat16()):
        y = other(x)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()


def ssm_names(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(".ssm")]


@pytest.mark.parametrize("name", SMALL)
def test_img_size(name):
    model = seeded(name, img_size=(96, 130))
    model.set_input_size((33, 47))
    assert model(image(1, 3, 33, 47)).shape == (1, 1000)
    with pytest.raises(ValueError, match="img_size must be positive"):
        model.set_input_size((0, 32))
    with pytest.raises(ValueError, match="patch size"):
        model.set_input_size(patch_size=8)


def test_data_config_and_listing():
    model = timm.create_model("vmamba_tiny_s1l8", device="meta")
    config = timm.data.resolve_model_data_config(model)
    assert config["crop_pct"] == 0.875
    assert config["interpolation"] == "bicubic"
    assert "vmamba_tiny_s1l8.in1k" in timm.list_models("*vmamba*", pretrained=True)
    assert not set(timm.list_pretrained("test_*")) & set(SMALL)
