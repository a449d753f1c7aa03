"""Reading patterns that the published code saved."""

import numpy as np
import pytest
import torch

from sparse_attn import load_published_averages


@pytest.mark.parametrize("source", ["bert", "fairseq", "transformer-xl"])
def test_published_patterns(tmp_path, source):
    pattern = np.random.default_rng(0).random((2, 3, 4, 4))  # layers, heads, queries, keys
    pattern[:, :, 3, :] = 0
    if source == "transformer-xl":
        pattern = np.concatenate([pattern, pattern], axis=3)
        stored = pattern.transpose(0, 2, 3, 1)[:, :, :, None].astype(np.float32)
    else:
        stored = pattern[:, None].astype(np.float32 if source == "bert" else np.float64)
    np.save(tmp_path / "p.npy", stored)
    averages = load_published_averages(tmp_path / "p.npy")
    torch.testing.assert_close(averages.mean, torch.from_numpy(pattern), rtol=1e-6, atol=0)
    assert averages.metadata["source"] == source
    assert (averages.counts[3] == 0).all() and (averages.counts[:3] == 1).all()


def test_a_source_that_is_named_is_believed(tmp_path):
    """Whatever the dtype would say; but the shape has to fit."""
    path = tmp_path / "p.npy"
    np.save(path, np.ones((2, 1, 3, 4, 4), dtype=np.float32))
    assert load_published_averages(path, source="fairseq").metadata["source"] == "fairseq"
    with pytest.raises(ValueError, match="not a transformer-xl pattern; axis 3 must have length 1"):
        load_published_averages(path, source="transformer-xl")


def test_patterns_are_where_the_user_means(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "p.npy", np.ones((2, 1, 3, 4, 4)))
    assert load_published_averages("~/p.npy").metadata == {"source": "fairseq", "file": "p.npy"}


def test_bad_patterns_are_named(tmp_path):
    path = tmp_path / "p.npy"
    with pytest.raises(FileNotFoundError, match="p.npy"):
        load_published_averages(path)
    np.save(path, np.zeros((2, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 3, 4, 4\)"):
        load_published_averages(path)
    for shape in ((2, 3, 4, 5, 6), (2, 1, 3, 4, 5)):
        np.save(path, np.zeros(shape))
        with pytest.raises(ValueError, match="fits no published pattern"):
            load_published_averages(path)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="not a readable .npy array"):
        load_published_averages(path)
    path.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError, match="p.npy: not a readable"):
        load_published_averages(path)
    np.save(path, np.full((1, 1, 1, 2, 2), np.nan))
    with pytest.raises(ValueError, match="nan at layer 0"):
        load_published_averages(path)
    with pytest.raises(ValueError, match="source is 'gpt'"):
        load_published_averages(path, source="gpt")
