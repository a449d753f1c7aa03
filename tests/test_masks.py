"""Global masks: selection, the published rule on its worked examples, combination, files."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn import AttentionAverages, GlobalMask
from sparse_attn.ranking import published_bounds

HEAD_0 = [[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.05, 0.15, 0.8]]
HEAD_1 = [[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]


def averages_of(mean: torch.Tensor, **metadata) -> AttentionAverages:
    return AttentionAverages.from_mean(mean.double(), **metadata)


def worked_example() -> AttentionAverages:
    mean = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    mean[0, :, :3, :3] = torch.tensor([HEAD_0, HEAD_1], dtype=torch.float64)
    return averages_of(mean)


def random_averages(layers=2, heads=3, length=20, seed=0) -> AttentionAverages:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, heads, length, length, generator=generator, dtype=torch.float64)
    return averages_of(logits.mul(3).softmax(-1), counts=torch.ones(length, length))


@pytest.mark.parametrize(
    ("pattern", "bounds"),
    [
        (torch.nn.functional.pad(torch.ones(3, 2), (0, 2, 0, 1)), (3, 2)),
        (torch.ones(4, 4), (3, 3)),
        (torch.zeros(4, 4), (0, 0)),
        (torch.nn.functional.pad(torch.ones(4, 3), (0, 1)), (3, 3)),
        (torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]), (3, 3)),
    ],
)
def test_published_bounds(pattern, bounds):
    assert published_bounds(pattern[None]) == bounds


@pytest.mark.parametrize(
    ("sparsity", "inside", "pruned", "empty_rows"),
    [
        (0, 1, 15, set()),
        (0.25, 7, 21, set()),
        (0.5, 9, 23, set()),
        (0.75, 14, 28, {(0, 1), (1, 0)}),
        (0.9, 16, 30, {(0, 1), (1, 0), (1, 1), (1, 2)}),
    ],
)
def test_strict_masks_of_the_worked_example(sparsity, inside, pruned, empty_rows):
    keep = GlobalMask.from_averages(worked_example(), sparsity, strict=True).keep[0]
    assert int((~keep[:, :3, :3]).sum()) == inside and int((~keep).sum()) == pruned
    assert {tuple(row) for row in (~keep[:, :3].any(-1)).nonzero().tolist()} == empty_rows


def test_strict_mask_in_full():
    keep = GlobalMask.from_averages(worked_example(), 0.5, strict=True).keep[0]
    assert (~keep).int().tolist() == [
        [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]],
        [[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]],
    ]


def test_strict_keeps_the_published_off_by_one():
    mean = (torch.arange(16, dtype=torch.float64) + 1).view(1, 1, 4, 4) / 16
    assert int((~GlobalMask.from_averages(averages_of(mean), 0.5, strict=True).keep).sum()) == 6
    # Transformer-XL ranks the whole array.
    whole = averages_of(mean, source="transformer-xl")
    assert int((~GlobalMask.from_averages(whole, 0.5, strict=True).keep).sum()) == 9


def test_strict_refuses_what_was_never_published():
    with pytest.raises(ValueError, match="strict=True is the published rule"):
        GlobalMask.from_averages(worked_example(), 0.5, granularity="tile", strict=True)
    empty_layer = torch.cat([worked_example().mean, torch.zeros(1, 2, 4, 4)])
    with pytest.raises(ValueError, match="layer 1 has no non-zero"):
        GlobalMask.from_averages(averages_of(empty_layer), 0.5, strict=True)


@pytest.mark.filterwarnings("ignore:the mask keeps")
@given(
    sparsity=st.floats(0, 0.99),
    scope=st.sampled_from(["layer", "head", "model"]),
    granularity=st.sampled_from(["element", "tile"]),
    length=st.integers(1, 40),
)
@settings(deadline=None, max_examples=50)
def test_budget_diagonal_and_order(sparsity, scope, granularity, length):
    averages = random_averages(length=length)
    mask = GlobalMask.from_averages(averages, sparsity, granularity, scope)
    assert mask.keep.diagonal(dim1=2, dim2=3).all()
    rows = 16 if granularity == "tile" else 1
    keep, heads = mask.keep, {"layer": 3, "head": 1, "model": 6}[scope]
    kept = {"layer": keep.sum((1, 2, 3)), "head": keep.sum((2, 3)).flatten(), "model": keep.sum()[None]}[scope]
    tiles = [min(rows, length - position // rows * rows) for position in range(length)]  # of the diagonal: their rows
    wanted = max(round((1 - sparsity) * heads * length**2), heads * sum(tiles))
    assert ((kept - wanted).abs() <= rows // 2).all()
    if granularity == "tile":
        assert torch.equal(keep, keep[:, :, ::16].repeat_interleave(16, 2)[:, :, :length])
    elif scope == "head":  # nothing pruned is larger than something kept, the diagonal apart
        off = ~torch.eye(length, dtype=torch.bool)
        for layer, head in ((0, 0), (1, 2)):
            mean, keep = averages.mean[layer, head][off], mask.keep[layer, head][off]
            if keep.any() and not keep.all():
                assert mean[keep].min() >= mean[~keep].max()


@pytest.mark.parametrize("made", ["from_averages", "random"])
def test_a_diagonal_beyond_the_budget_is_warned_about(made):
    def mask(**arguments):
        if made == "random":
            return GlobalMask.random(2, 3, 32, sparsity=0.9, **arguments)
        return GlobalMask.from_averages(random_averages(length=32), 0.9, **arguments)

    with pytest.warns(UserWarning, match=r"keeps 50.0%.* than the 10.0% that sparsity 0.9 .*keep_diagonal") as warned:
        kept = mask(granularity="tile")
    assert len(warned) == 1 and warned[0].filename == __file__
    assert kept.density().mean() == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask(granularity="tile", keep_diagonal=False)
        mask()


def test_sparsity_zero_keeps_everything_seen():
    averages = worked_example()
    keep = GlobalMask.from_averages(averages, 0.0).keep
    assert torch.equal(keep[0, 0], (averages.counts > 0) | torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize(("longest", "warned"), [(6, True), (7, False), (12, False)])
def test_averages_of_short_sequences_are_warned_about(longest, warned, recwarn):
    counts = torch.zeros(12, 12, dtype=torch.int64)
    counts[:longest, :longest] = 1
    GlobalMask.from_averages(AttentionAverages(torch.rand(1, 1, 12, 12) * counts, counts), 0.5)
    messages = [str(one.message) for one in recwarn]
    assert len(messages) == warned
    assert not warned or "for 12 positions, but the longest sequence had 6" in messages[0]
    assert all(one.filename == __file__ for one in recwarn)


def test_unseen_positions_are_pruned_but_for_the_diagonal():
    counts = torch.ones(6, 6)
    counts[4:] = counts[:, 4:] = 0
    averages = AttentionAverages.from_mean(torch.rand(1, 2, 6, 6, dtype=torch.float64) + 0.1, counts)
    keep = GlobalMask.from_averages(averages, 0.2).keep
    outside = keep.clone()
    outside[:, :, :4, :4] = False
    assert torch.equal(outside.any(0).any(0), torch.diag(torch.tensor([0, 0, 0, 0, 1, 1])).bool())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"expected a share in \[0, 1\)"):
        GlobalMask.from_averages(worked_example(), sparsity)
    with pytest.raises(ValueError, match=r"expected a share in \[0, 1\)"):
        GlobalMask.random(1, 1, 4, sparsity=sparsity)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="granularity is 'block', expected one of"):
        GlobalMask.from_averages(worked_example(), 0.5, granularity="block")
    with pytest.raises(ValueError, match="scope is 'all'"):
        GlobalMask.from_averages(worked_example(), 0.5, scope="all")
    for sparsity in ("0.9", None):
        with pytest.raises(TypeError, match=f"sparsity is {sparsity!r}, expected a number"):
            GlobalMask.random(1, 1, 4, sparsity=sparsity)
    with pytest.raises(TypeError, match=r"averages is Tensor, expected AttentionAverages.*from_mean"):
        GlobalMask.from_averages(torch.ones(1, 1, 4, 4), 0.5)
    for flag in ("keep_diagonal", "strict"):
        with pytest.raises(TypeError, match=f"{flag} is 'False', expected True or False"):
            GlobalMask.from_averages(worked_example(), 0.5, **{flag: "False"})
    with pytest.raises(ValueError, match="layers is 0, expected a whole number, at least 1"):
        GlobalMask.random(0, 1, 4, sparsity=0.5)
    with pytest.raises(ValueError, match="no counted position"):
        GlobalMask.from_averages(AttentionAverages(torch.zeros(1, 1, 2, 2), torch.zeros(2, 2)), 0.5)
    with pytest.raises(ValueError, match="boolean tensor"):
        GlobalMask.from_tensor(torch.ones(1, 1, 2, 2))
    for shape, missing in (((2, 2), "layers and heads"), ((2, 2, 2), "layers")):
        with pytest.raises(ValueError, match=f"the mask has shape .*; pass {missing} to repeat it"):
            GlobalMask.from_tensor(torch.ones(shape, dtype=torch.bool))
    with pytest.raises(TypeError, match="heads is '2', expected a whole number"):
        GlobalMask.from_tensor(torch.ones(2, 2, dtype=torch.bool), layers=2, heads="2")
    with pytest.raises(TypeError, match="function is str, expected a function"):
        GlobalMask.from_function("band", 1, 1, 4)
    with pytest.raises(TypeError, match="seed is 1.5, expected a whole number"):
        GlobalMask.random(1, 1, 4, sparsity=0.5, seed=1.5)
    with pytest.raises(TypeError, match="keep_diagonal is 'no', expected True or False"):
        GlobalMask.random(1, 1, 4, sparsity=0.5, keep_diagonal="no")
    with pytest.raises(TypeError, match="averages is Tensor, expected AttentionAverages"):
        GlobalMask.random(1, 1, 4, sparsity=0.5).retained_attention(torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="collect them from the mask's model with max_length=4"):
        GlobalMask.random(1, 3, 4, sparsity=0.5).retained_attention(worked_example())
    with pytest.raises(ValueError, match="returned torch.int64"):
        GlobalMask.from_function(lambda layer, head, query, key: query - key, 1, 1, 4)
    with pytest.raises(ValueError, match=r"returned \(3, 3\), expected what broadcasts to \(4, 4\)"):
        GlobalMask.from_function(lambda *_: torch.ones(3, 3, dtype=torch.bool), 1, 1, 4)
    with pytest.raises(ValueError, match="returned NoneType"):
        GlobalMask.from_function(lambda *_: None, 1, 1, 4)
    with pytest.raises(ValueError, match="layers is 5, but the mask has shape"):
        GlobalMask.from_tensor(torch.ones(2, 1, 4, 4, dtype=torch.bool), layers=5)
    with pytest.raises(ValueError, match=r"heads is 5, but the mask has shape \(2, 1, 4, 4\)"):
        GlobalMask.from_tensor(torch.ones(2, 1, 4, 4, dtype=torch.bool), heads=5)
    with pytest.raises(ValueError, match="cannot be combined"):
        GlobalMask.random(1, 1, 4, sparsity=0.5) & GlobalMask.random(1, 1, 5, sparsity=0.5)
    for layer in (1, -1):
        with pytest.raises(ValueError, match=f"layer is {layer}; the mask has layers 0 to 0"):
            GlobalMask.random(1, 1, 4, sparsity=0.5).layout(layer)
    with pytest.raises(TypeError, match="layer is 0.0, expected the index"):
        GlobalMask.random(1, 1, 4, sparsity=0.5).layout(0.0)
    with pytest.raises(ValueError, match="device is 'gpu', which this torch has not"):
        GlobalMask.random(1, 1, 4, sparsity=0.5).layout(0, "gpu")


def test_random_masks():
    mask = GlobalMask.random(2, 3, 10, 12, sparsity=0.5, keep_diagonal=False, seed=1)
    assert mask.keep.shape == (2, 3, 10, 12) and (mask.keep.sum((1, 2, 3)) == 180).all()
    assert mask == GlobalMask.random(2, 3, 10, 12, sparsity=0.5, keep_diagonal=False, seed=1)
    assert mask != GlobalMask.random(2, 3, 10, 12, sparsity=0.5, keep_diagonal=False, seed=2)


def test_functions_tensors_and_logic():
    band = GlobalMask.from_function(lambda layer, head, query, key: (query - key).abs() <= layer + head, 2, 2, 5)
    assert band.keep[1, 1, 0].tolist() == [True, True, True, False, False]
    stripes = GlobalMask.from_tensor(torch.arange(5).eq(0).expand(5, 5), layers=2, heads=2)
    assert torch.equal((band | stripes).keep, band.keep | stripes.keep)
    assert torch.equal((band & ~stripes).keep, band.keep & ~stripes.keep)
    assert band.density().shape == (2, 2) and band.density()[0, 0].item() == pytest.approx(0.2)
    assert copy.deepcopy(band) == band


def test_a_function_is_told_layer_head_query_and_key():
    mask = GlobalMask.from_function(lambda *places: sum(f * p for f, p in zip((1, 2, 4, 8), places)) % 5 == 0, 2, 3, 4)
    layer, head, query, key = (torch.arange(size) for size in (2, 3, 4, 4))
    total = layer.view(-1, 1, 1, 1) + 2 * head.view(-1, 1, 1) + 4 * query.view(-1, 1) + 8 * key
    assert torch.equal(mask.keep, total % 5 == 0)


def test_retained_attention():
    averages = worked_example()
    mask = GlobalMask.from_averages(averages, 0.5, strict=True)
    kept = averages.mean * mask.keep
    torch.testing.assert_close(mask.retained_attention(averages), kept.sum((2, 3)) / averages.mean.sum((2, 3)))
    full = GlobalMask.from_tensor(torch.ones(4, 4, dtype=torch.bool), layers=1, heads=2)
    torch.testing.assert_close(full.retained_attention(averages), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="do not fit a mask"):
        GlobalMask.random(1, 1, 4, sparsity=0.5).retained_attention(averages)


def test_a_head_without_attention_retains_none():
    sums = torch.rand(1, 2, 4, 4, dtype=torch.float64)
    sums[0, 1] = 0
    share = GlobalMask.random(1, 2, 4, sparsity=0.5).retained_attention(AttentionAverages(sums, torch.ones(4, 4)))
    assert 0 < share[0, 0] < 1 and share[0, 1] == 0


def test_metadata_say_how_the_mask_was_made():
    made = {"sparsity": 0.5}
    mask = GlobalMask(torch.ones(1, 1, 2, 2, dtype=torch.bool), made)
    made["sparsity"] = 0.9
    assert mask.metadata == {"sparsity": 0.5}  # its own
    mask = GlobalMask.from_averages(averages_of(torch.rand(1, 1, 4, 4), model="m"), 0.5, scope="head")
    assert mask.metadata == {
        "sparsity": 0.5, "granularity": "element", "scope": "head", "keep_diagonal": True, "strict": False,
        "averages": {"model": "m"},
    }  # fmt: skip


def test_a_sparsity_of_numpy_is_saved(tmp_path):
    GlobalMask.random(1, 2, 8, sparsity=np.float32(0.5), seed=3).save(tmp_path / "m.safetensors")
    made = {"sparsity": 0.5, "granularity": "element", "random_seed": 3}
    assert GlobalMask.load(tmp_path / "m.safetensors").metadata == made


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 7, 5), (1, 2, 64, 64)])
def test_save_and_load_give_the_same_mask(tmp_path, shape):
    mask = GlobalMask(torch.rand(shape) < 0.3, {"sparsity": 0.7})
    mask.save(tmp_path / "m.safetensors")
    loaded = GlobalMask.load(tmp_path / "m.safetensors")
    assert loaded == mask and loaded.metadata == {"sparsity": 0.7}


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    GlobalMask.random(2, 3, 32, sparsity=0.5).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="m.safetensors: not a readable"):
        GlobalMask.load(path)
    path.write_bytes(whole.replace(b"[2, 3, 32, 32]", b"[9, 9, 32, 32]"))
    with pytest.raises(ValueError, match="m.safetensors: damaged global mask"):
        GlobalMask.load(path)


def test_a_mask_and_its_layouts_take_one_bit_per_position():
    mask = GlobalMask.random(2, 3, 64, sparsity=0.9)
    keep = mask.keep
    assert mask.shape == keep.shape and torch.equal(mask.layer(1), keep[1])
    keep.zero_()  # a copy
    assert 0 < mask.density().mean() < 1
    layout = mask.layout(1)
    layout.lists(16)
    held = [mask._packed.bits, layout._source.bits]
    assert [tensor.numel() for tensor in held] == [keep.numel() // 8, keep.numel() // 16]
    assert held[0].untyped_storage().data_ptr() == held[1].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="layer is 2; the mask has layers 0 to 1"):
        mask.layer(2)


def test_layouts_are_compiled_once():
    mask = GlobalMask.random(2, 3, 32, sparsity=0.5)
    assert mask.layout(1) is mask.layout(1, "cpu") is not mask.layout(0)


def test_masks_do_not_depend_on_the_default_device():
    """A user may have set another default device; masks are made on the CPU all the same."""
    torch.set_default_device("meta")
    try:
        masks = [
            GlobalMask.random(1, 2, 20, sparsity=0.5),
            GlobalMask.from_function(lambda layer, head, query, key: query >= key, 1, 2, 20),
            GlobalMask.random(1, 2, 20, sparsity=0.5, granularity="tile"),
        ]
        works = [mask.layout(0).work(16) for mask in masks]
    finally:
        torch.set_default_device(None)
    assert all(mask.keep.device.type == "cpu" for mask in masks) and all(0 < work <= 1 for work in works)
