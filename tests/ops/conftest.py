"""Memory the operator is handed is poisoned with NaN, so that a result it forgot to write cannot pass."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)
