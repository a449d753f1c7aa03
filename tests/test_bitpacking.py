import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_attn import bitpacking, extension
from sparse_attn.bitpacking import PackedMask, pack_bits, unpack_bits

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 1000, 262_144, 1_000_003]
THREE_BYTES = torch.ones(3, dtype=torch.uint8)
needs_extension = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


@pytest.fixture(params=[pytest.param("extension", marks=needs_extension), "numpy"])
def path(request, monkeypatch):
    """Runs the test on one of the two implementations, the extension's with several threads."""
    if request.param == "numpy":
        monkeypatch.setattr(bitpacking, "_native", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(threads)


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < 0.5


def expected_bytes(mask: torch.Tensor) -> np.ndarray:
    return np.packbits(mask.numpy().reshape(-1), bitorder="little")


@pytest.mark.parametrize("size", SIZES)
def test_there_and_back(path, size):
    mask = random_mask(size)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8 and packed.shape == ((size + 7) // 8,)
    np.testing.assert_array_equal(packed.numpy(), expected_bytes(mask))
    back = unpack_bits(packed, size)
    assert back.dtype == torch.bool
    assert torch.equal(back, mask)


def test_bit_order(path):
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [0b0000_1001, 0b0000_0010]
    back = unpack_bits(torch.tensor([0b1000_0001, 0b10], dtype=torch.uint8), 10)
    assert back.nonzero().flatten().tolist() == [0, 7, 9]


def test_every_byte_value(path):
    packed = torch.arange(256, dtype=torch.uint8)
    mask = unpack_bits(packed, 2048)
    np.testing.assert_array_equal(mask.view(torch.uint8), np.unpackbits(packed.numpy(), bitorder="little"))
    assert torch.equal(pack_bits(mask), packed)


@pytest.mark.parametrize("size", [5, 77, 400_001])
def test_unused_bits_are_written_as_zero_and_ignored_when_read(path, size):
    packed = pack_bits(torch.ones(size, dtype=torch.bool))
    assert packed[-1].item() == 2 ** (size % 8) - 1
    packed[-1] = 255
    assert torch.equal(unpack_bits(packed, size), torch.ones(size, dtype=torch.bool))


def test_any_shape_and_strides(path):
    mask = random_mask(3, 50, 41)
    cuts = (mask[:, ::3, 5:], mask[1].T, mask[0, 0, 0], mask[:1].expand(4, 50, 41))
    for view in (mask, mask.transpose(0, 2), *cuts):
        np.testing.assert_array_equal(pack_bits(view).numpy(), expected_bytes(view))
    packed = pack_bits(mask)
    spread = torch.stack([packed, torch.zeros_like(packed)], dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(unpack_bits(spread, mask.numel()), mask.flatten())


@pytest.mark.parametrize("size", [3, 64, 77])
def test_memory_with_other_values_than_0_and_1(path, size):
    values = (torch.arange(size) * 37 % 256).to(torch.uint8)
    assert torch.equal(pack_bits(values.view(torch.bool)), pack_bits(values != 0))


def test_several_threads_at_once(path):
    masks = [random_mask(500_000 + 13 * i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        packed = list(pool.map(pack_bits, masks))
        back = list(pool.map(unpack_bits, packed, [mask.numel() for mask in masks]))
    for mask, its_bytes, its_copy in zip(masks, packed, back):
        np.testing.assert_array_equal(its_bytes.numpy(), expected_bytes(mask))
        assert torch.equal(its_copy, mask)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack_bits(torch.ones(3)), TypeError, "must be a torch.bool tensor, not torch.float32"),
        (lambda: pack_bits([True]), TypeError, "mask must be a torch.bool tensor, not list"),
        (lambda: pack_bits(THREE_BYTES.to("meta").bool()), ValueError, "on the CPU, not on meta"),
        (lambda: unpack_bits(THREE_BYTES.char(), 20), TypeError, "torch.uint8 tensor, not torch.int8"),
        (lambda: unpack_bits(THREE_BYTES, 20.0), TypeError, "count is 20.0, expected a whole number"),
        (lambda: unpack_bits(THREE_BYTES, -1), ValueError, "count is -1, expected a whole number, at least 0"),
        (lambda: unpack_bits(THREE_BYTES, 25), ValueError, r"25 bits take uint8 \[4\].* \[3\]"),
        (lambda: unpack_bits(THREE_BYTES, 16), ValueError, r"16 bits take uint8 \[2\].* \[3\]"),
        (lambda: unpack_bits(THREE_BYTES[:, None], 24), ValueError, r"packed is \[3, 1\]"),
    ],
)
def test_refusals(path, call, error, message):
    with pytest.raises(error, match=message):
        call()


@needs_extension
@pytest.mark.parametrize(
    ("operator", "arguments", "message"),
    [
        ("pack_bits", (torch.ones(3),), "mask must be a bool tensor"),
        ("unpack_bits", (torch.ones(3), 24), "packed must be a uint8 tensor"),
        ("unpack_bits", (THREE_BYTES[:, None], 24), "1 dimension, not 2"),
        ("unpack_bits", (THREE_BYTES, 25), "25 bits take 4 bytes, but packed has 3"),
        ("unpack_bits", (THREE_BYTES[:0], -1), "must not be negative, got -1"),
        ("unpack_bits", (THREE_BYTES, 2**63 - 1), "but packed has 3"),
    ],
)
def test_refusals_of_the_operators(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.sparse_attn, operator)(*arguments)


@needs_extension
@pytest.mark.parametrize("shape", [(3, 2, 5, 8), (3, 1, 5, 5), (2, 3, 3, 3), (1, 1, 1, 1)])
def test_packed_masks(path, shape):
    """As a whole and in parts, which begin within a byte where their size is no multiple of 8; strided ones too."""
    mask = torch.rand(shape) < 0.3
    for source in (mask, mask.transpose(2, 3).contiguous().transpose(2, 3), mask[:1].expand(shape)):
        packed = PackedMask.pack(source)
        assert packed.bits.numel() == -(-mask.numel() // 8) and torch.equal(packed.unpack(), source)
        assert torch.equal(packed.bits, pack_bits(source))
        for index, part in enumerate(source):
            assert torch.equal(packed[index].unpack(), part) and torch.equal(packed[index][0].unpack(), part[0])
    with pytest.raises(ValueError, match="bits take uint8"):
        PackedMask(torch.zeros(3, dtype=torch.uint8), (40,))


@pytest.mark.parametrize("size", [0, 65])
def test_operators_are_well_formed(size):
    mask = random_mask(size)
    torch.library.opcheck(torch.ops.sparse_attn.pack_bits.default, (mask,))
    torch.library.opcheck(torch.ops.sparse_attn.unpack_bits.default, (pack_bits(mask), size))


def test_an_extension_that_was_built_is_used():
    built = list(Path(extension.__file__).parent.glob("_C*.so"))
    assert extension.available() == bool(built), extension.reason()


WITHOUT_EXTENSION = """
from concurrent.futures import ThreadPoolExecutor
import torch
from sparse_attn import bitpacking, extension

extension._load = lambda: "it is not there"
masks = [torch.rand(1000) < 0.5 for _ in range(32)]
with ThreadPoolExecutor(8) as pool:
    packed = list(pool.map(bitpacking.pack_bits, masks))
assert all(torch.equal(bitpacking.unpack_bits(p, 1000), m) for p, m in zip(packed, masks))
"""


def test_one_warning_per_process():
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    for part in ("masks are packed by numpy", "it is not there", "pip install --no-build-isolation"):
        assert part in done.stderr


def test_reason_names_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    assert "was not built" in extension._load.__wrapped__()
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    assert f"{library} cannot be loaded" in extension._load.__wrapped__()
