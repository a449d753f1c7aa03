"""Shared set-up. Without a GPU, Triton's kernels run in its interpreter, chosen before they are imported."""

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests import interpreter

    interpreter.make_faster()

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes is no matter of a test
settings.load_profile("untimed")


@pytest.fixture
def poisoned():
    """Fills what torch.empty returns with NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
