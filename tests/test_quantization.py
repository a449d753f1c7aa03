"""The table quantiser against the published values (method `linear_slog_clamped_midval`)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_attn import QuantizationTable, load_tables, log_table, quantize, save_tables
from sparse_attn.files import save_tensors

INPUTS = (0, 0.0005, 0.001, 0.0015, 0.01, 0.05, 0.1, 0.126, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999, 1)
THREE_BITS = (
    0, 0, 0.00163789, 0.00163789, 0.0117877, 0.0316228, 0.0848343, 0.0848343, 0.227585, 0.227585,
    0.61054, 0.61054, 0.61054, 0.61054, 0.61054,
)  # fmt: skip
TWO_BITS = (0, 0, 0.00316228, 0.00316228, 0.0316228, 0.0316228, *[0.316228] * 9)


@pytest.mark.parametrize(("bits", "published"), [(3, THREE_BITS), (2, TWO_BITS)])
def test_published_values(bits, published):
    result = quantize(torch.tensor(INPUTS, dtype=torch.float64), log_table(bits))
    torch.testing.assert_close(result, torch.tensor(published, dtype=torch.float64), rtol=1e-5, atol=0)


def test_published_levels():
    three = (0, 0.00163789, 0.00439397, 0.0117877, 0.0316228, 0.0848343, 0.227585, 0.61054)
    assert log_table(3).levels == pytest.approx(three, rel=1e-5)
    assert log_table(4).levels[1:] == pytest.approx([10 ** (-3 + 0.2 * k + 0.1) for k in range(15)])
    assert log_table(2).step == pytest.approx(-math.log2(1e-3) / 3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_count_and_order(bits):
    table = log_table(bits)
    assert table.bits == bits and len(table.levels) == 2**bits
    assert list(table.levels) == sorted(set(table.levels)) and table.levels[-1] < 1


@given(st.integers(1, 8), st.floats(0, 1))
def test_a_level_is_half_a_bin_away(bits, p):
    table = log_table(bits)
    rounded = quantize(torch.tensor(p, dtype=torch.float64), table).item()
    if p < table.threshold:
        assert rounded == 0
    else:
        assert rounded in table.levels
        assert abs(math.log2(rounded) - math.log2(p)) <= table.step / 2 + 1e-9


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=20))
def test_rounding_is_monotonic(values):
    ordered = torch.tensor(sorted(values), dtype=torch.float32)
    assert (quantize(ordered, log_table(3)).diff() >= 0).all()


def test_shape_dtype_and_straight_through_gradient():
    p = torch.rand(2, 3, 4, dtype=torch.float32, requires_grad=True)
    rounded = quantize(p, log_table(3))
    assert rounded.shape == p.shape and rounded.dtype == p.dtype
    rounded.sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_low_precision_is_rounded_as_the_same_numbers_in_float32(dtype, bits):
    p = torch.rand(4096).to(dtype)
    assert torch.equal(quantize(p, bits), quantize(p.float(), bits).to(dtype))
    below = torch.tensor(0.00099945, dtype=dtype)
    assert below.item() < 1e-3 and quantize(below, bits) == 0


@pytest.mark.parametrize("levels", [list, np.array, torch.tensor, lambda levels: tuple(np.float32(levels))])
def test_levels_may_come_as_any_sequence(levels):
    table = QuantizationTable(1e-3, levels([0.0, 0.5]))
    assert table == QuantizationTable(1e-3, (0.0, 0.5)) and {table: 1}
    assert {type(level) for level in table.levels} == {float}  # files take no others


def test_rounding_passes_tangents_straight_through():
    p, tangent = torch.rand(20), torch.randn(20)
    rounded, passed = torch.func.jvp(lambda p: quantize(p, 3), (p,), (tangent,))
    assert torch.equal(rounded, quantize(p, 3)) and torch.equal(passed, tangent)


def test_bits_may_be_any_integer():
    p = torch.rand(100)
    assert log_table(np.int64(3)) == log_table(3)
    assert torch.equal(quantize(p, 3), quantize(p, log_table(3))) and quantize(p, None) is p


@pytest.mark.parametrize(("bits", "error"), [(0, ValueError), (9, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bits_outside_the_range(bits, error):
    with pytest.raises(error, match=r"expected.*1\.\.8"):
        log_table(bits)


def test_integers_are_not_rounded():
    with pytest.raises(TypeError, match=r"probabilities are torch.int64"):
        quantize(torch.ones(3, dtype=torch.int64), 3)


def test_tables_are_saved(tmp_path):
    path, own = tmp_path / "levels.safetensors", QuantizationTable(1 / 3, (0.0, 0.1))
    for tables in (own, [own, log_table(3)], []):
        save_tables(path, tables)
        assert load_tables(path) == tables
    for tables in (3, [own, 3]):
        with pytest.raises(TypeError, match="is int, expected a"):
            save_tables(path, tables)
    save_tensors(path, "quantization tables", {}, {"single": True, "tables": [{"threshold": 2.0, "levels": [0, 1]}]})
    with pytest.raises(ValueError, match="levels.safetensors: damaged quantization tables file: threshold is 2.0"):
        load_tables(path)


def test_bad_tables():
    with pytest.raises(TypeError, match="threshold is '1e-3', expected a number"):
        log_table(3, "1e-3")
    with pytest.raises(TypeError, match="threshold is '1e-3', expected a number"):
        QuantizationTable("1e-3", (0.0, 0.1))
    with pytest.raises(TypeError, match="levels is float, expected 2"):
        QuantizationTable(1e-3, 0.5)
    with pytest.raises(TypeError, match="probabilities is list, expected a tensor"):
        quantize([0.1], 3)
    with pytest.raises(ValueError, match="threshold is 1.5"):
        log_table(3, threshold=1.5)
    for count in (0, 1, 3, 512):
        with pytest.raises(ValueError, match=f"levels has {count} values"):
            QuantizationTable(1e-3, (0.0,) * count)
    for threshold in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"threshold is {threshold}, expected a probability strictly between"):
            QuantizationTable(threshold, (0.0, 0.5))
    for levels in ((0.1, 0.2), (0.0, -0.5), (0.0, 1e30), (0.0, float("nan"))):
        with pytest.raises(ValueError, match=r"expected numbers from 0 to 65504; the first is 0.0"):
            QuantizationTable(1e-3, levels)
