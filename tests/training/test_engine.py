"""The loss of an update."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3

import vmamba  # noqa: F401  (registers the models)
from tests.running import make_folder, one_line, train
from vmamba.training.engine import Learner, Mesa, _loss


@pytest.fixture
def learner():
    torch.manual_seed(0)
    model = timm.create_model("test_vmamba", num_classes=3).eval()
    ema = ModelEmaV3(copy.deepcopy(model))
    torch.nn.init.normal_(ema.module.head.fc.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mesa = Mesa(weight=0.7, after=2)
    return Learner(model, model, torch.nn.CrossEntropyLoss(), optimizer, None, scaler, seed=0, ema=ema, mesa=mesa)


def test_the_average_joins_the_loss_after_its_epoch(learner):
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    logits = learner.model(images)
    opinion = learner.ema.module(images).softmax(1)
    alone = F.cross_entropy(logits, targets)
    together = alone - 0.7 * (opinion * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(_loss(learner, images, targets, epoch=2), alone)
    torch.testing.assert_close(_loss(learner, images, targets, epoch=3), together)


def test_no_gradient_goes_through_the_average(learner):
    _loss(learner, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), epoch=3).backward()
    assert all(parameter.grad is None for parameter in learner.ema.module.parameters())
    assert learner.model.head.fc.weight.grad.any()


def test_there_must_be_an_average(tmp_path):
    result = train(make_folder(tmp_path / "data", per_class=2), tmp_path / "runs", "run", "--mesa", 1, "--no-ema")
    assert "mesa is 1.0, expected 0 without ema" in one_line(result)
