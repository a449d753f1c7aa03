"""Arguments that are refused by name, alike in all functions."""

from functools import partial

import numpy as np
import pytest
import torch

from sparse_attn.arguments import expect_flags, expect_kind, expect_numbers, expect_shares, expect_whole


def test_what_is_expected_passes():
    expect_flags(a=True, b=False)
    expect_flags(or_none=True, a=None, b=True)
    expect_whole(a=1, b=np.int64(7))
    expect_whole(0, or_none=True, a=0, b=None, c=torch.tensor(3))
    expect_whole(None, a=-5)
    expect_numbers(a=-1, b=0.5, c=np.float32(2), d=torch.tensor(0.5))
    expect_numbers(or_none=True, a=None)
    expect_shares(a=0, b=0.0, c=np.float64(0.999))
    expect_shares(or_none=True, a=None)
    expect_kind((int, str), "a number or text", a=1, b="1")


@pytest.mark.parametrize(
    ("expect", "value", "error", "message"),
    [
        (expect_flags, "no", TypeError, "size is 'no', expected True or False$"),
        (expect_flags, None, TypeError, "size is None, expected True or False$"),
        (expect_flags, 1, TypeError, "size is 1, expected True or False$"),
        (expect_whole, 0, ValueError, "size is 0, expected a whole number, at least 1$"),
        (expect_whole, -2, ValueError, "size is -2, expected a whole number, at least 1$"),
        (partial(expect_whole, None), "5", TypeError, "size is '5', expected a whole number$"),
        (expect_whole, 2.0, TypeError, "size is 2.0, expected a whole number, at least 1$"),
        (expect_whole, "3", TypeError, "size is '3', expected"),
        (expect_whole, True, TypeError, "size is True, expected"),
        (expect_whole, None, TypeError, "size is None, expected"),
        (partial(expect_kind, str, "a name"), 3, TypeError, "size is int, expected a name$"),
        (expect_numbers, "3", TypeError, "size is '3', expected a number$"),
        (expect_numbers, None, TypeError, "size is None, expected a number$"),
        (expect_numbers, [1.0], TypeError, r"size is \[1.0\], expected a number$"),
        (expect_shares, "0.9", TypeError, "size is '0.9', expected a number$"),
        (expect_shares, 1.0, ValueError, r"size is 1.0, expected a share in \[0, 1\), such as 0.1 for 10 %$"),
        (expect_shares, 90, ValueError, "size is 90, expected a share"),
        (expect_shares, -0.1, ValueError, "size is -0.1, expected a share"),
        (expect_shares, float("nan"), ValueError, "size is nan, expected a share"),
    ],
)
def test_what_is_not_is_named(expect, value, error, message):
    with pytest.raises(error, match=message):
        expect(size=value)


def test_none_is_named_where_it_is_allowed():
    for expect in (expect_whole, expect_numbers, expect_shares):
        with pytest.raises(TypeError, match=", or None$"):
            expect(or_none=True, size="all")
    with pytest.raises(TypeError, match="expected True, False or None$"):
        expect_flags(or_none=True, size="all")
