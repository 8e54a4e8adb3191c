import signal
import textwrap
import time

import pytest
import torch
from torch import nn

from tests.running import start
from vmamba.errors import UserError
from vmamba.files import remove_leftovers
from vmamba.training import checkpoint


def test_round_trip(tmp_path):
    content = {"state_dict": {"a": torch.arange(5)}, "epoch": 3, "names": ["x"], "size": (3, 4), "none": None}
    checkpoint.save(content, tmp_path / "a.pth")
    loaded = checkpoint.read(tmp_path / "a.pth")
    assert torch.equal(loaded.pop("state_dict")["a"], torch.arange(5))
    assert loaded == {"epoch": 3, "names": ["x"], "size": (3, 4), "none": None}
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]


def test_full_disk_keeps_the_previous_file(tmp_path):
    """A limit on the size of files fails a write half-way, as a full disk does."""
    code = f"""
        import resource, sys
        from pathlib import Path
        import torch
        from vmamba.errors import UserError
        from vmamba.training import checkpoint

        path = Path({str(tmp_path)!r}) / "last.pth"
        checkpoint.save({{"epoch": 1}}, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            checkpoint.save({{"epoch": 2, "weights": torch.zeros(1_000_000)}}, path)
        except UserError as error:
            print(error)
            sys.exit(2)
    """
    process = start("-c", textwrap.dedent(code))
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2, err
    assert out.strip() == f"cannot write {tmp_path / 'last.pth'}: File too large; the previous one is intact"
    assert checkpoint.read(tmp_path / "last.pth") == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_kill_during_a_save_keeps_a_whole_file(tmp_path):
    code = f"""
        import itertools
        from pathlib import Path
        import torch
        from vmamba.training import checkpoint

        path = Path({str(tmp_path)!r}) / "last.pth"
        for number in itertools.count(1):
            checkpoint.save({{"number": number, "weights": torch.full((4_000_000,), float(number))}}, path)
    """
    path = tmp_path / "last.pth"
    for _ in range(3):
        process = start("-c", textwrap.dedent(code))
        _wait_for(path.exists)
        _wait_for(lambda: any(file.name.startswith(".last.pth.tmp-") for file in tmp_path.iterdir()))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=100)
        content = checkpoint.read(path)
        assert content["weights"].unique().tolist() == [content["number"]]
        if remove_leftovers(tmp_path):
            break
    else:
        pytest.fail("no kill hit a save")
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def _wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_damaged_files(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save({"weights": torch.randn(10_000)}, path)
    whole = path.read_bytes()
    for name, data in {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no checkpoint",
        "html": b"<html>404</html>",
    }.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged, incomplete or no checkpoint at all") as caught:
            checkpoint.read(path)
        assert "\n" not in str(caught.value), name


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="not found"):
        checkpoint.read(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.read(tmp_path)


class Evil:
    def __reduce__(self):
        return eval, ("print('code ran')",)


def test_code_in_a_file_is_never_run(tmp_path, capsys):
    torch.save({"state_dict": {}, "extra": Evil()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds Python objects"):
        checkpoint.read(tmp_path / "a.pth")
    assert "code ran" not in capsys.readouterr().out


def test_weights_of_another_model_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    weights = {"0.weight": torch.zeros(4, 2), "0.bias": torch.zeros(4), "2.weight": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(model, weights, "file.pth")
    assert str(caught.value) == (
        "file.pth does not fit Sequential: 1 shape(s) differ (0.weight is [4, 2], expected [4, 3]); "
        "2 missing (1.weight, 1.bias); 1 unexpected (2.weight)"
    )


def test_only_the_first_mismatches_are_named():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(UserError, match=r"8 missing \(0.weight, 0.bias, 1.weight, \.\.\.\)"):
        checkpoint.load_weights(model, {}, "file.pth")
