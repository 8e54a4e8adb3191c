import dataclasses

import pytest
import yaml

from vmamba.errors import UserError
from vmamba.training.config import TrainConfig, bundled, default_recipe, dump, load, parse
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
        ("amp: fp8", "amp is 'fp8', expected none or bf16 or fp16"),
        ("warmup_epochs: 300", "warmup_epochs is 300, expected 0 or more and less than epochs (300)"),
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
