# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one seed, one torch thread, the data folder, and the gpu marker."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported


@pytest.fixture(autouse=True)
def seed() -> None:
    """Gives every test the same random streams, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data sets named by DPLIP_DATA; skips where there is none."""
    folder = os.environ.get("DPLIP_DATA")
    if not folder:
        pytest.skip("DPLIP_DATA names no data folder")
    return Path(folder)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
