"""Averages as data: means, merging, files."""

import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparse_attn import AttentionAverages, GlobalMask
from sparse_attn.files import save_tensors


def some_averages(query_len=5, seed=0) -> AttentionAverages:
    generator = torch.Generator().manual_seed(seed)
    sums = torch.rand(2, 3, query_len, query_len, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 9, (query_len, query_len), generator=generator)
    return AttentionAverages(sums, counts, sequences=8, tokens=30, metadata={"model": "m", "data": "d"})


def test_merge_is_the_average_over_both():
    first, second = some_averages(5), some_averages(3, seed=1)
    merged = first.merge(second)
    counts = first.counts.clone()
    counts[:3, :3] += second.counts
    sums = first.sums.clone()
    sums[:, :, :3, :3] += second.sums
    torch.testing.assert_close(merged.mean, sums / counts)
    assert (merged.sequences, merged.tokens, merged.metadata) == (16, 60, first.metadata)
    torch.testing.assert_close(second.merge(first).mean, merged.mean)
    second.metadata.update(data="e", source="bert")
    assert first.merge(second).metadata == second.merge(first).metadata == {"model": "m"}  # what both say
    assert torch.equal(first.sums, some_averages(5).sums)  # inputs stay as they were


def test_merge_follows_the_published_running_mean():
    """Worked example: two sentences in a batch of one size, three in a larger one."""
    first = torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64)
    second = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    averages = AttentionAverages.from_mean(first[None, None], torch.full((2, 2), 2)).merge(
        AttentionAverages.from_mean(second[None, None], torch.full((3, 3), 3))
    )
    expected = torch.tensor([[0.36, 0.46, 0.3], [0.26, 0.68, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(averages.mean[0, 0], expected)
    assert averages.counts.tolist() == [[5, 5, 3], [5, 5, 3], [3, 3, 3]]


def test_save_and_load_give_the_same_object(tmp_path):
    averages = some_averages()
    averages.save(tmp_path / "a.safetensors")
    loaded = AttentionAverages.load(tmp_path / "a.safetensors")
    assert torch.equal(loaded.sums, averages.sums) and torch.equal(loaded.counts, averages.counts)
    assert (loaded.sequences, loaded.tokens, loaded.metadata) == (8, 30, {"model": "m", "data": "d"})


def test_bad_values_and_shapes_are_named():
    sums = torch.zeros(1, 2, 3, 3)
    sums[0, 1, 2, 0] = float("nan")
    with pytest.raises(ValueError, match="nan at layer 0, head 1, query 2, key 0"):
        AttentionAverages(sums, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"sums of shape \(1, 2, 3, 3\) and counts of shape \(2, 2\)"):
        AttentionAverages(torch.zeros(1, 2, 3, 3), torch.ones(2, 2))
    with pytest.raises(TypeError, match="counts is ndarray, expected a tensor"):
        AttentionAverages(sums, torch.ones(3, 3).numpy())
    with pytest.raises(TypeError, match="mean is ndarray, expected a tensor"):
        AttentionAverages.from_mean(sums.numpy())
    with pytest.raises(TypeError, match="averages of torch.complex64 and counts"):
        AttentionAverages(sums + 0j, torch.ones(3, 3))
    with pytest.raises(ValueError, match="sequences is -4"):
        AttentionAverages(torch.zeros(1, 1, 2, 2), torch.ones(2, 2), -4)
    with pytest.raises(TypeError, match="other is Tensor, expected AttentionAverages"):
        some_averages().merge(sums)
    for sums, counts in ((-torch.ones(1, 1, 2, 2), torch.ones(2, 2)), (torch.zeros(1, 1, 2, 2), -torch.ones(2, 2))):
        with pytest.raises(ValueError, match="negative"):
            AttentionAverages(sums, counts)
    with pytest.raises(ValueError, match="2 layers x 3 heads with 1 layers x 1 heads"):
        some_averages().merge(AttentionAverages(torch.zeros(1, 1, 2, 2), torch.ones(2, 2)))


def test_sums_are_float64_whatever_they_come_as():
    averages = AttentionAverages(torch.rand(1, 1, 2, 2), torch.ones(2, 2))
    assert (averages.sums.dtype, averages.counts.dtype) == (torch.float64, torch.int64)
    assert averages.merge(averages).mean.dtype == torch.float64


def test_a_mean_may_be_anything_where_nothing_was_seen():
    sums, counts = torch.rand(1, 2, 3, 3, dtype=torch.float64), torch.tensor([[2, 1, 0], [1, 1, 0], [0, 0, 0]])
    sums = sums * (counts > 0)
    averages = AttentionAverages.from_mean(sums / counts, counts)
    torch.testing.assert_close(averages.sums, sums)
    assert (averages.mean[:, :, counts == 0] == 0).all()
    with pytest.raises(ValueError, match="never seen"):
        AttentionAverages(torch.ones(1, 1, 3, 3), counts)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\) and counts \(4, 4\)"):
        AttentionAverages.from_mean(sums, torch.ones(4, 4))
    for count in (float("nan"), float("inf"), 0.5):
        with pytest.raises(ValueError, match="counts hold what is no whole number"):
            AttentionAverages.from_mean(sums, torch.full((3, 3), count))


def test_files_are_where_the_user_means(tmp_path, monkeypatch):
    """ "~" is the home folder, a link stays one, the mode is the user's, and metadata are what JSON has."""
    monkeypatch.setenv("HOME", str(tmp_path))
    averages = some_averages()
    averages.metadata["lengths"] = (1, 2)
    previous = os.umask(0o027)
    try:
        averages.save("~/folder/averages.safetensors")
    finally:
        os.umask(previous)
    target = tmp_path / "folder" / "averages.safetensors"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(target)
    some_averages(3).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and AttentionAverages.load("~/link") == some_averages(3)
    averages.metadata["model"] = torch.nn.Linear
    with pytest.raises(TypeError, match="link|averages.*metadata.*JSON"):
        averages.save("~/folder/averages.safetensors")
    assert [path.name for path in target.parent.iterdir()] == ["averages.safetensors"]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        AttentionAverages.load(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match="a folder; expected a sparse_attn attention averages file"):
        AttentionAverages.load(tmp_path)
    with pytest.raises(IsADirectoryError, match="a folder; expected the name of a file"):
        some_averages().save(tmp_path)
    averages, path = some_averages(), tmp_path / "a.safetensors"
    averages.save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04 something else", whole[:20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.safetensors: not a readable safetensors file"):
            AttentionAverages.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not one of sparse_attn"):
        AttentionAverages.load(path)
    GlobalMask.random(1, 1, 4, sparsity=0.5).save(path)
    with pytest.raises(ValueError, match="holds global mask, expected attention averages"):
        AttentionAverages.load(path)
    path.write_bytes(whole.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'))
    with pytest.raises(ValueError, match="format version 9 .* is newer than 1"):
        AttentionAverages.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": None}, r"file without the tensors \['counts'\]; it has \['sums'\]"),
        ({"tokens": None}, "damaged attention averages file: tokens is None"),
        ({"tokens": "2"}, "damaged attention averages file: tokens is '2'"),
        ({"metadata": None}, "damaged attention averages file: 'NoneType'"),
        ({"format_version": None}, "damaged attention averages file: its format version is None"),
    ],
)
def test_a_file_with_a_bad_part_is_named(tmp_path, changes, message):
    tensors = {"sums": torch.zeros(1, 1, 2, 2), "counts": torch.ones(2, 2)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in changes}
    header = {"sequences": 1, "tokens": 2, "metadata": {}, **changes}
    save_tensors(tmp_path / "a.safetensors", "attention averages", tensors, header)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{message}"):
        AttentionAverages.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.safetensors"
    some_averages().save(path)
    before = path.read_bytes()

    def fails(*_, **__):
        raise kind("no space")

    monkeypatch.setattr("sparse_attn.files.save_file", fails)
    with pytest.raises(OSError, match="no space"):
        some_averages(7).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_one_line_and_comparison():
    mean = torch.ones(2, 3, 4, 4) / 4
    averages, other = (AttentionAverages.from_mean(mean) for _ in range(2))
    assert repr(averages) == ("AttentionAverages(layers=2, heads=3, query_len=4, key_len=4, sequences=0, tokens=0)")
    assert averages == other and averages != AttentionAverages.from_mean(mean / 2) and averages != 1
    assert averages != AttentionAverages.from_mean(mean[:, :, :3, :3])
    assert averages != AttentionAverages.from_mean(mean, model="m") != AttentionAverages.from_mean(mean, model="n")
