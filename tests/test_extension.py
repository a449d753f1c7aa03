"""What happens where the C++ extension is missing."""

import pytest
import torch

from sparse_attn import extension, sparse_attention
from sparse_attn.attention import prepare
from tests.helpers import random_inputs, random_layout

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # said once in a process


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(extension, "reason", lambda: "it was not built")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_computes_and_is_prepared(without_extension, dtype):
    layout, inputs = random_layout(2, 16, 0.5, "cpu"), random_inputs((1, 2, 10, 32), dtype, "cpu")
    prepare(layout, 32, dtype)
    assert {backend for backend, *_ in layout.arguments} == {"torch"}
    assert torch.equal(sparse_attention(*inputs, layout), sparse_attention(*inputs, layout, backend="torch"))


def test_the_native_backend_says_how_to_get_it(without_extension):
    layout, inputs = random_layout(2, 16, 0.5, "cpu"), random_inputs((1, 2, 10, 32), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"'native' has no kernels: it was not built; install a C\+\+ compiler"):
        prepare(layout, 32, torch.float32, "native")
    with pytest.raises(RuntimeError, match=r"native: it was not built; install a C\+\+ compiler"):
        sparse_attention(*inputs, layout, backend="native")
