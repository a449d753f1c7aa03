"""The benchmark's workloads and masks are what their names say."""

import pytest
import torch

from benchmarks.attention_inputs import Inputs, LayerMask, additive_mask, dense_positions
from benchmarks.attention_workloads import COMPILED_ALL, FORWARD, SQUAD_LENGTHS, WORKLOADS, default_workloads
from benchmarks.masks import GRANULARITIES, make, mask_file, real_mask
from benchmarks.synthetic_masks import GLOBAL_TOKENS, synthetic_mask
from sparse_attn import AttentionAverages, GlobalMask
from tests.benchmarks.attention_samples import packed_workload, tiny_workload

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_committed_masks_keep_a_tenth(granularity):
    mask = real_mask(granularity)
    assert mask.keep.shape == (6, 12, 384, 384)
    assert mask.density().mean(1).sub(0.1).abs().max() < 5e-4
    assert mask.keep.diagonal(dim1=2, dim2=3).all()
    assert mask.metadata["granularity"] == granularity and mask.metadata["averages"]["windows"] == 1219
    assert "/" not in str(mask.metadata)
    tiles = mask.keep.view(6, 12, 24, 16, 384)
    assert (tiles == tiles[:, :, :, :1]).all() == (granularity == "tile")


def test_the_committed_masks_are_small():
    assert sum(mask_file(granularity).stat().st_size for granularity in GRANULARITIES) < 300_000


def test_masks_are_made_from_averages(tmp_path, monkeypatch, capsys):
    averages = AttentionAverages.from_mean(torch.rand(1, 2, 32, 32), model="/somewhere/model")
    averages.save(tmp_path / "averages.safetensors")
    monkeypatch.setattr(make, "mask_file", lambda granularity: tmp_path / f"{granularity}.xz")
    assert make.main([str(tmp_path / "averages.safetensors")]) == 0
    monkeypatch.setattr("benchmarks.masks.mask_file", lambda granularity: tmp_path / f"{granularity}.xz")
    made = real_mask.__wrapped__("tile")
    assert made == GlobalMask.from_averages(averages, 0.9, "tile") and "somewhere" not in str(made.metadata)
    assert make.main([str(tmp_path / "absent")]) == 2 and "absent: no such file" in capsys.readouterr().err
    assert make.main([]) == 2


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("length", [1024, 1500])
def test_synthetic_masks_have_their_density_and_parts(granularity, length):
    keep = synthetic_mask(granularity, CPU, heads=6, length=length)
    assert keep.shape == (1, 6, length, length)
    assert keep.double().mean().item() == pytest.approx(0.1, rel=0.005)
    assert keep[0, :, :GLOBAL_TOKENS].all() and keep[0, :, :, :GLOBAL_TOKENS].all()
    stripes = keep[0].all(1)  # keys that all queries keep
    assert (stripes[:, GLOBAL_TOKENS:].sum(1) >= length // 64 - 1).all()
    assert not torch.equal(stripes[0], stripes[1])
    middle = keep[0, :, length // 2].sum(1)
    assert (middle.diff() >= 0).all() and middle[-1] > middle[0]  # bands widen from head to head
    tiles = keep[0, :, : length // 16 * 16].view(6, -1, 16, length)
    assert (tiles == tiles[:, :, :1]).all() == (granularity == "tile")
    if granularity == "element":
        band = keep[0, 0] & ~stripes[0]
        query, key = band[GLOBAL_TOKENS:].nonzero(as_tuple=True)
        assert (query + GLOBAL_TOKENS - key).min() == -(query + GLOBAL_TOKENS - key).max()


def test_a_density_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="less than what global tokens and stripes keep"):
        synthetic_mask("element", CPU, heads=2, length=128)


def test_workloads_are_those_of_the_design():
    assert [workload.name for workload in WORKLOADS] == [
        "squad384", "long4096", "packed-squad", "short128", "mid1024", "long2048", "long16384",
    ]  # fmt: skip
    shapes = {one.name: (one.batch, one.heads, one.length, one.head_dim) for one in WORKLOADS}
    assert shapes["squad384"] == (32, 12, 384, 64) and shapes["long4096"] == (2, 12, 4096, 64)
    packed = next(one for one in WORKLOADS if one.packed)
    assert packed.tokens == sum(SQUAD_LENGTHS) and len(SQUAD_LENGTHS) == 32 and max(SQUAD_LENGTHS) <= 384
    assert {one.name for one in WORKLOADS if one.bits == (None, 3)} == {"squad384", "packed-squad", "long4096"}


def test_a_cpu_gets_smaller_batches_and_no_compiled_backward_pass():
    assert default_workloads(GPU) == list(WORKLOADS)
    assert "long16384" not in [workload.name for workload in default_workloads(CPU)]
    squad, packed = (workload.on(CPU) for workload in WORKLOADS if workload.bits == (None, 3) and workload.cpu_batch)
    assert squad.batch == 8 and {direction for direction, _ in squad.compiled} == {FORWARD}
    assert packed.lengths == SQUAD_LENGTHS[:8] and packed.length == max(SQUAD_LENGTHS[:8]) and packed.batch == 8
    assert WORKLOADS[0].on(GPU).compiled == COMPILED_ALL
    assert WORKLOADS[-1].on(CPU).batch == 1
    assert packed.description()["tokens"] == sum(SQUAD_LENGTHS[:8])


def test_padded_and_packed_inputs_hold_the_same_tokens():
    workload = packed_workload()
    inputs = Inputs(workload, CPU, torch.float32, seed=1)
    padded, packed = inputs.tensors(packed=False), inputs.tensors(packed=True)
    assert padded[0].shape == (3, 2, 40, 16) and packed[0].shape == (62, 2, 16)
    assert padded[0].transpose(1, 2).is_contiguous()
    assert inputs.cu_seqlens.tolist() == [0, 40, 57, 62] and inputs.cu_seqlens.dtype == torch.int32
    for index in range(3):
        assert torch.equal(inputs.sequence(padded[1], index, 1), inputs.sequence(packed[1], index, 1))
    assert (padded[2][2, :, 5:] == 0).all()


def test_inputs_tell_and_undo_changes():
    inputs = Inputs(tiny_workload(), CPU, torch.float32, seed=1)
    before = inputs.tensors(packed=False)[1].clone()
    assert not inputs.restore()
    inputs.tensors(packed=False)[1].sub_(1.0)
    assert inputs.restore() and torch.equal(inputs.tensors(packed=False)[1], before) and not inputs.restore()


@pytest.mark.parametrize("workload", [tiny_workload(), packed_workload()], ids=["padded", "packed"])
def test_density_and_work_count_real_tokens(workload):
    keep = workload.masks("element", CPU)[0]
    layer = LayerMask(keep)
    lengths = workload.sequence_lengths
    kept = sum(int(keep[:, :length, :length].sum()) for length in lengths)
    assert layer.kept(workload) == kept
    assert layer.density(workload) == pytest.approx(kept / (2 * sum(length**2 for length in lengths)))
    assert dense_positions(workload) == 2 * sum(length**2 for length in lengths)
    assert 0 < layer.work(workload) < 1


def test_work_of_a_whole_mask_is_that_of_its_layout():
    workload = tiny_workload(length=64)
    layer = LayerMask(workload.masks("element", CPU)[0])
    assert layer.work(workload) == pytest.approx(layer.layout.work(16))


def test_biases_prune_and_pad_without_infinities():
    inputs = Inputs(packed_workload(), CPU, torch.float16, seed=0)
    assert additive_mask(Inputs(tiny_workload(), CPU, torch.float16, seed=0), None) is None
    padding = additive_mask(inputs, None)
    assert padding.shape == (3, 1, 1, 40) and (padding == 0).sum((1, 2, 3)).tolist() == [40, 17, 5]
    keep = packed_workload().masks("tile", CPU)[0]
    bias = LayerMask(keep).bias(inputs)
    assert bias.shape == (3, 2, 40, 40) and bias.isfinite().all()
    assert torch.equal(bias[1] == 0, keep[:, :40, :40] & (torch.arange(40) < 17))
