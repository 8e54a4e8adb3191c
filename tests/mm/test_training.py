"""Detectors and segmentors learn, go on where they stopped, and learn in two processes what they learn in one."""

import pytest
import torch

pytest.importorskip("mmdet", reason="needs the mm extra")
pytest.importorskip("mmseg", reason="needs the mm extra")

from tests.mm.dense_runs import CONFIGS, EPOCH, losses, make_data, quick, scenes_in, train
from tests.running import ROOT, one_line, torchrun


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data") / "scenes")
    with scenes_in(folder):
        yield folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every demonstration, trained for three epochs in one go."""
    folder = tmp_path_factory.mktemp("runs")
    for config in CONFIGS:
        result = train(config, folder / config, epochs=3)
        assert result.status == 0, result.err
    return folder


@pytest.mark.parametrize("config", CONFIGS)
def test_the_loss_falls(runs, config):
    values = losses(runs / config)
    assert len(values) == 3 * EPOCH
    assert sum(values[-EPOCH:]) < 0.9 * sum(values[:EPOCH])


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_is_as_if_never_stopped(runs, config, tmp_path):
    assert train(config, tmp_path, epochs=2).status == 0
    result = train(config, tmp_path, "--resume", epochs=3)
    assert result.status == 0, result.err
    assert losses(tmp_path) == losses(runs / config)[2 * EPOCH :]
    ours, theirs = (torch.load(run / "epoch_3.pth", weights_only=False) for run in (tmp_path, runs / config))
    assert ours["meta"]["iter"] == 3 * EPOCH
    for name, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], value), name
    for index, state in theirs["optimizer"]["state"].items():
        assert torch.equal(ours["optimizer"]["state"][index]["exp_avg_sq"], state["exp_avg_sq"]), index
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]


def test_an_earlier_run_is_kept(runs):
    before = {path: path.stat().st_mtime_ns for path in (runs / "digits_upernet").rglob("*")}
    message = one_line(train("digits_upernet", runs / "digits_upernet"))
    assert "holds the checkpoints of an earlier run; go on from them with --resume" in message
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "digits_upernet").rglob("*")}


def test_what_cannot_be_resumed(runs, tmp_path):
    assert "there is no such file" in one_line(train("digits_upernet", tmp_path, "--resume", tmp_path / "epoch_1.pth"))
    weights = torch.load(runs / "digits_upernet" / "epoch_3.pth", weights_only=False)["state_dict"]
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    message = one_line(train("digits_upernet", tmp_path, "--resume", tmp_path / "weights.pth"))
    assert "holds no optimiser's state" in message
    assert "load_from=" in message


AGREEMENT = '''
import hashlib
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class WriteDown(Hook):
    """What a process has seen and learnt."""

    images = ""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.images += "".join(Path(sample.img_path).stem + "\\n" for sample in data_batch["data_samples"])

    def after_train(self, runner):
        weights = b"".join(p.detach().numpy().tobytes() for p in runner.model.parameters())
        file = Path(runner.work_dir, f"process_{get_rank()}.txt")
        file.write_text(hashlib.sha256(weights).hexdigest() + "\\n" + self.images)
'''


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes(config, tmp_path):
    """They share the images of an epoch, and end with the same weights, bit by bit."""
    (tmp_path / "agreement.py").write_text(AGREEMENT)
    command = [ROOT / "tools" / "train_dense.py", tmp_path / "two.py", "--work-dir", tmp_path / "run"]
    options = ("train_dataloader.batch_size=2", "train_cfg.max_epochs=2", "train_cfg.val_interval=2")
    base = next(ROOT.glob(f"configs/*/{config}.py"))
    (tmp_path / "two.py").write_text(
        f"_base_ = [{str(base)!r}]\n"
        "custom_imports = dict(imports=['vmamba.mm', 'vmamba.mm.seeding', 'agreement'])\n"
        "custom_hooks = [dict(type='SeedByIteration'), dict(type='WriteDown')]\n"
    )
    status, _, err = torchrun(2, *command, *quick(*options), PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert status == 0, err[-3000:]
    values = losses(tmp_path / "run")
    assert len(values) == 2 * EPOCH
    assert sum(values[-2:]) < sum(values[:2])
    (first, *seen), (second, *others) = ((tmp_path / "run" / f"process_{i}.txt").read_text().split() for i in (0, 1))
    assert first == second
    epochs = [sorted(seen[start : start + 8] + others[start : start + 8]) for start in (0, 8)]
    assert epochs == [[f"train_{index:06d}" for index in range(16)]] * 2
