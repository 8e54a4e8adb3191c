"""What every model must do whatever its architecture: any size, any layout, bfloat16, independent images."""

import pytest
import torch

from tests.models.common import SMALL, image, seeded


@pytest.mark.parametrize("size", [(96, 130), (33, 47), (31, 5), (7, 4)])
@pytest.mark.parametrize("name", SMALL)
def test_any_input_size(name, size):
    assert seeded(name)(image(2, 3, *size)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_images_do_not_see_each_other(name):
    model = seeded(name)
    x = image(3, 3, 48, 40)
    torch.testing.assert_close(model(x), torch.cat([model(single) for single in x.split(1)]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_memory_format_does_not_matter(name):
    model = seeded(name)
    x = image(2, 3, 64, 48)
    expected = model(x)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_autocast(name):
    model = seeded(name, num_classes=10).train()
    x = image(2, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()

    assert (y - expected).abs().max() < 0.1 * expected.std()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_dropout_acts_in_training_only(name):
    model = seeded(name, drop_rate=0.5, drop_path_rate=0.5)
    x = image(2, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
