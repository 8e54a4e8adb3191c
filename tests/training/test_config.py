import dataclasses
import errno
from pathlib import Path

import pytest
import yaml
from timm.data.transforms import _str_to_torch_interpolation

from vmamba.errors import UserError
from vmamba.training.config import (
    INTERPOLATIONS,
    TrainConfig,
    bundled,
    default_recipe,
    dump,
    load,
    parse,
    with_absolute_paths,
)
from vmamba.training.model_factory import default_cfg

PUBLISHED = {
    "vanilla_vmamba_tiny": 0.2,
    "vanilla_vmamba_small": 0.3,
    "vanilla_vmamba_base": 0.6,
    "vmamba_tiny_s2l5": 0.2,
    "vmamba_small_s2l15": 0.3,
    "vmamba_base_s2l15": 0.6,
    "vmamba_tiny_s1l8": 0.2,
    "vmamba_small_s1l20": 0.3,
    "vmamba_base_s1l20": 0.5,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe(name):
    config = load(name)
    assert config.model == name
    assert config.drop_path_rate == PUBLISHED[name]
    assert (config.epochs, config.warmup_epochs, config.batch_size) == (300, 20, 1024)
    assert config.lr_batch_size is not None
    factor = config.batch_size / config.lr_batch_size
    assert [config.lr * factor, config.warmup_lr * factor, config.min_lr * factor] == pytest.approx([1e-3, 1e-6, 1e-5])
    assert (config.weight_decay, config.clip_grad, config.ema_decay) == (0.05, 5.0, 0.9999)
    assert (config.mixup, config.cutmix, config.smoothing, config.reprob) == (0.8, 1.0, 0.1, 0.25)
    assert (config.crop_pct, config.interpolation, config.img_size) == (0.875, "bicubic", 224)
    assert config.ema == (name != "vanilla_vmamba_tiny")


@pytest.mark.parametrize("name", bundled())
def test_bundled_recipes_are_valid_and_their_models_exist(name):
    config = load(name, {"initial_checkpoint": "weights.pth"})  # which some start from
    default_cfg(config.model)
    assert parse(yaml.safe_load(dump(config)), "again") == config


@pytest.mark.parametrize("name", ["vim_tiny_patch16_stride8_224", "vim_small_patch16_stride8_224"])
def test_fine_tuning_does_not_start_from_random_weights(name):
    with pytest.raises(UserError, match="its rates are for trained weights; give --initial-checkpoint"):
        load(name)


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_overrides_are_read_like_yaml():
    config = load("digits", {"lr": "1e-3", "scale": "0.5,1", "drop_path_rate": "null", "ema": False, "img_size": "64"})
    assert (config.lr, config.scale, config.drop_path_rate, config.ema, config.img_size) == (
        *(1e-3, (0.5, 1.0), None),
        *(False, 64),
    )


def test_yaml_reads_exponents_without_a_dot(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nmodel_kwargs: {a: 1}\n")
    config = load(str(tmp_path / "a.yaml"))
    assert config.lr == 1e-3
    assert config.model_kwargs == {"a": 1}


def test_base_of_a_users_file_may_be_a_bundled_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: vmamba_base\nepochs: 100\n")
    config = load(str(tmp_path / "mine.yaml"))
    assert (config.model, config.epochs, config.drop_path_rate) == ("vmamba_base", 100, 0.6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean epochs"),
        ("epochs: many", "epochs: 'many' is not a whole number"),
        ("epochs: 2.5", "epochs: 2.5 is not a whole number"),
        ("epochs: true", "epochs: True is not a whole number"),
        ("lr: null", "lr: None is not a number"),
        ("ema: 3", "ema: 3 is not true or false"),
        ("scale: [0.1]", "scale is (0.1,), expected two numbers"),
        ("scale: [0.9, 0.1]", "scale is (0.9, 0.1), expected two numbers, the smaller one first"),
        ("scale: [0.9, 1.1]", "scale is (0.9, 1.1), expected shares of the image, at most 1"),
        ("img_size: -3", "img_size is -3, expected at least 1"),
        ("mixup: -1", "mixup is -1.0, expected 0 or more"),
        ("clip_grad: 0", "clip_grad is 0.0, expected more than 0"),
        ("hflip: 1.1", "hflip is 1.1, expected from 0 to 1"),
        ("reprob: .nan", "reprob is nan, expected from 0 to 1"),
        ("drop_path_rate: 2", "drop_path_rate is 2.0, expected 0 or more and less than 1"),
        ("opt_betas: [0.9, 1]", "opt_betas is (0.9, 1.0), expected 0 or more and less than 1"),
        ("crop_pct: 0", "crop_pct is 0.0, expected more than 0 and at most 1"),
        ("remode: grey", "remode is 'grey', expected const or rand or pixel"),
        ("interpolation: foo", "interpolation is 'foo', expected nearest or box or"),
        ("amp: fp8", "amp is 'fp8', expected none or bf16 or fp16"),
        ("warmup_epochs: 300", "warmup_epochs is 300, expected less than epochs (300)"),
        ("- a\n- b", "should hold 'key: value' lines, not a list"),
        ("a: [", "is not valid YAML"),
        ("base: nothing", "no bundled recipe is called 'nothing'"),
        ("base: bad.yaml", "leads back to the file itself"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mistakes_in_flags_are_not_those_of_the_file():
    for override, message in {("lr", "abc"): "--lr: 'abc' is", ("lr_batch_size", 0): "--lr-batch-size is 0,"}.items():
        with pytest.raises(UserError, match=f"^{message}"):
            load("digits", dict([override]))
    with pytest.raises(UserError, match=r"^digits\.yaml: warmup_epochs is 2, expected less than epochs \(1\)"):
        load("digits", {"epochs": 1})


def test_interpolations_are_those_of_timm():
    assert set(INTERPOLATIONS) == set(_str_to_torch_interpolation)


def test_config_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"is a folder, expected a YAML file"):
        load(str(tmp_path))
    (tmp_path / "a.yaml").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"cannot read config file .*a\.yaml: Permission denied"):
        load(str(tmp_path / "a.yaml"))


def refuse(*args, **kwargs):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "digits", "hfds/photos"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "here.txt").touch()
    values = {"data": "photos", "data_dir": "new", "class_map": "here.txt", "initial_checkpoint": "here.txt"}
    config = with_absolute_paths(TrainConfig(**values))
    assert [getattr(config, key) for key in values] == [
        str(tmp_path / name) for name in ("photos", "new", "here.txt", "here.txt")
    ]
    for values in (
        {"data": "digits"},
        {"data": "hfds/photos", "data_dir": "https://example.org/photos"},
        {"data": "nowhere", "class_map": "beside_the_data.txt"},
    ):
        assert with_absolute_paths(TrainConfig(**values)) == TrainConfig(**values)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean vmamba_tiny_s1l8"):
        load("vmamba_tiny_s1l9")
    with pytest.raises(UserError, match=r"config file nowhere\.yaml not found"):
        load("nowhere.yaml")


@pytest.mark.parametrize(
    ("model", "data", "recipe"),
    [
        (None, None, "digits"),
        ("resnet18", "digits", "digits"),
        ("vmamba_tiny_s1l8", "photos", "vmamba_tiny_s1l8"),
        ("vmamba_tiny_s1l8.in1k", "photos", "vmamba_tiny_s1l8"),
        ("resnet18", "photos", "_imagenet"),
    ],
)
def test_default_recipe(model, data, recipe):
    assert default_recipe(model, data) == recipe
