"""`collect_averages`: a mean over real tokens, the same as transformers' own attentions give."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertForMaskedLM, BertForQuestionAnswering, BertModel

from sparse_attn import AttentionAverages, GlobalMask, collect_averages, collect_probabilities, patch_bert
from tests.integrations.conftest import padded_inputs, small_config
from tests.integrations.test_families import LAYERS, MODELS, make


def from_output_attentions(model, batches, length, layers=2) -> AttentionAverages:
    """The definition, sequence by sequence: outer products of real positions."""
    sums = torch.zeros(layers, 2, length, length, dtype=torch.float64)
    counts = torch.zeros(length, length, dtype=torch.int64)
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    for batch in batches:
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions
        assert len(attentions) == layers
        for index, real in enumerate(batch["attention_mask"].bool()):
            at = real.nonzero()[:, 0]
            counts[at.view(-1, 1), at] += 1
            for layer, attention in enumerate(attentions):
                sums[layer][:, at.view(-1, 1), at] += attention[index][:, at.view(-1, 1), at].double()
    return AttentionAverages(sums, counts)


@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_mean_over_real_tokens(model, side):
    batches = [padded_inputs((20, 13, 1), "left" if side == "left" else "right"), padded_inputs((9, 9))]
    if side == "holes":
        batches[0]["attention_mask"][0, 4:8] = 0
    averages = collect_averages(model, batches, progress=False, data_name="random")
    expected = from_output_attentions(model, batches, 20)
    torch.testing.assert_close(averages.sums, expected.sums, atol=1e-6, rtol=0)
    assert torch.equal(averages.counts, expected.counts)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert (averages.sequences, averages.tokens) == (5, tokens)
    assert averages.metadata["data"] == "random"


def test_batching_and_order_do_not_matter(model):
    sequences = [padded_inputs((length,)) for length in (7, 20, 3, 12)]
    one_by_one = collect_averages(model, sequences, progress=False)
    reverse = collect_averages(model, sequences[::-1], progress=False)
    together = {"input_ids": torch.zeros(4, 20, dtype=torch.long), "attention_mask": torch.zeros(4, 20).long()}
    for row, sequence in enumerate(sequences):
        length = sequence["input_ids"].shape[1]
        together["input_ids"][row, :length] = sequence["input_ids"]
        together["attention_mask"][row, :length] = 1
    padded = collect_averages(model, [together], progress=False)
    parts = [collect_averages(model, [sequence], progress=False) for sequence in sequences]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    for other in (reverse, padded, merged):
        torch.testing.assert_close(other.mean, one_by_one.mean, atol=1e-6, rtol=0)
        assert torch.equal(other.counts, one_by_one.counts) and other.tokens == one_by_one.tokens


def test_dropout_is_off_and_the_model_comes_back_as_it_was(model):
    model.encoder.layer[0].attention.self.dropout.p = 0.9
    model.train()
    config, implementation = model.config, model.config._attn_implementation
    first, second = (collect_averages(model, [padded_inputs((6,))], progress=False) for _ in range(2))
    assert model.training and model.config is config and config._attn_implementation == implementation
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert first.mean.sum(-1).allclose(torch.ones(6, dtype=torch.float64))
    assert second.mean.sum(-1).allclose(torch.ones(6, dtype=torch.float64))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_every_module_keeps_its_own_mode(model):
    model.train().encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    collect_averages(model, [padded_inputs((6,))], progress=False)
    assert [module.training for module in model.modules()] == modes
    collect_probabilities(model, [padded_inputs((6,))], GlobalMask.random(2, 2, 8, sparsity=0.5), progress=False)
    assert [module.training for module in model.modules()] == modes


def test_head_classes_max_length_and_no_padding_mask():
    model = BertForQuestionAnswering(small_config()).eval()
    batch = {"input_ids": torch.randint(0, 99, (2, 9)), "start_positions": torch.tensor([0, 1]),
             "end_positions": torch.tensor([0, 1])}  # fmt: skip
    averages = collect_averages(model, [batch], max_length=16, progress=False)
    assert averages.sums.shape == (2, 2, 16, 16) and averages.tokens == 18
    assert (averages.counts[:9, :9] == 2).all() and averages.counts.sum() == 2 * 81
    assert collect_averages(model, [batch], max_length=9, progress=False).sums.shape == (2, 2, 9, 9)


def test_averages_say_which_model_and_data_they_are_of(model):
    model.config.name_or_path = "a checkpoint"
    assert collect_averages(model, [padded_inputs()], progress=False).metadata == {"model": "a checkpoint"}
    named = collect_averages(model, [padded_inputs()], progress=False, model_name="m", data_name="d")
    assert named.metadata == {"model": "m", "data": "d"}


def test_memory_does_not_grow_with_batches(model):
    """Any number of batches: they are streamed, none is kept."""
    alive = []

    def batches():
        import weakref

        for _ in range(6):
            batch = padded_inputs((9, 5))
            alive.append(weakref.ref(batch["input_ids"]))
            yield batch
            del batch
            assert sum(reference() is not None for reference in alive) <= 2

    assert collect_averages(model, batches(), progress=False).sequences == 12


def test_decoders_count_what_they_may_see():
    model = BertModel(small_config(is_decoder=True)).eval()
    averages = collect_averages(model, [{"input_ids": torch.randint(0, 99, (3, 7))}], progress=False)
    assert torch.equal(averages.counts, 3 * torch.ones(7, 7, dtype=torch.int64).tril())

    batch = padded_inputs((9, 5))
    counts = torch.ones(9, 9, dtype=torch.int64)
    counts[:5, :5] = 2
    padded = collect_averages(model, [batch], progress=False)
    assert torch.equal(padded.counts, counts.tril())
    expected = from_output_attentions(model, [batch], 9)
    torch.testing.assert_close(padded.sums, expected.sums, atol=1e-6, rtol=0)


def test_a_key_value_cache_and_cross_attention_keep_padding():
    """Where padding cannot leave the tensors, its rows and columns are skipped."""
    model = BertModel(small_config(is_decoder=True, add_cross_attention=True)).eval()
    batch = padded_inputs((12, 7, 3)) | {"encoder_hidden_states": torch.randn(3, 5, 64)}
    batch["encoder_attention_mask"] = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1] * 5])
    batch["attention_mask"][0, 3:6] = 0
    averages = collect_averages(model, [batch], progress=False)
    expected = from_output_attentions(model, [batch], 12)
    torch.testing.assert_close(averages.sums, expected.sums, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name):
    model = make(name).cpu()
    batches = [padded_inputs((20, 13, 1)), padded_inputs((9, 9))]
    expected = from_output_attentions(model, batches, 20, layers=LAYERS)
    averages = collect_averages(model, batches, progress=False)
    torch.testing.assert_close(averages.sums, expected.sums, atol=1e-6, rtol=0)
    around = nn.Sequential(nn.ModuleDict({"auto_model": model}))  # the shape of a SentenceTransformer
    assert torch.equal(collect_averages(around, batches, progress=False).sums, averages.sums)


def test_bfloat16_models_are_averaged_in_float32(model):
    batches = [padded_inputs((20, 13)), padded_inputs((9, 9))]
    averages = collect_averages(model.bfloat16(), batches, progress=False)
    tokens = averages.counts.diagonal().double()
    torch.testing.assert_close(averages.sums.sum(-1), tokens.expand(2, 2, 20), atol=1e-6, rtol=0)


def test_sums_of_many_sequences_stay_exact(model):
    """Sequences are added in float32 a few at a time, so an average does not drift with their number."""
    batch = padded_inputs((2,) * 4000)
    expected = from_output_attentions(model, [batch], 2)
    averages = collect_averages(model, [batch], progress=False)
    torch.testing.assert_close(averages.mean, expected.mean, atol=1e-7, rtol=0)


def test_rows_of_padding_alone_count_as_empty_sequences(model):
    batch = padded_inputs((6, 4))
    batch["attention_mask"][1] = 0
    alone = collect_averages(model, [{"input_ids": batch["input_ids"][:1]}], progress=False)
    for other in (batch, {name: tensor.flip(0) for name, tensor in batch.items()}):
        averages = collect_averages(model, [other], progress=False)
        torch.testing.assert_close(averages.sums, alone.sums, atol=1e-6, rtol=0)
        assert (averages.sequences, averages.tokens) == (2, 6)
    batch["attention_mask"][:] = 0
    with pytest.raises(ValueError, match="all tokens of 2 sequences are padding"):
        collect_averages(model, [batch], max_length=6, progress=False)


def test_no_attention_of_a_whole_batch_is_ever_held(model):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 4 and result.shape[-1] == result.shape[-2]:
                self.numbers = max(self.numbers, result.shape[0])
            return result

    batch = padded_inputs((30,) * 8)
    with Largest() as largest:
        collect_averages(model, [batch], progress=False)
    assert largest.numbers == 2  # the sums, [layers, heads, length, length]
    with Largest() as largest:
        from_output_attentions(model, [batch], 30)
    assert largest.numbers == 8


def test_what_follows_the_last_attention_is_not_computed():
    model = BertForMaskedLM(small_config()).eval()
    calls = []
    model.cls.register_forward_hook(lambda *_: calls.append("head"))
    for number, layer in enumerate(model.bert.encoder.layer):
        layer.output.register_forward_hook(lambda *_, number=number: calls.append(number))
    collect_averages(model, [padded_inputs()], progress=False)
    assert calls == [0]
    model(**padded_inputs())
    assert calls == [0, 0, 1, "head"]


@pytest.mark.parametrize("shape", [(3, 20), (3, 50), (2, 40), (5, 40), (3, 1)])
def test_a_padding_mask_of_another_shape_than_the_batch_is_named(model, shape):
    batch = {"input_ids": torch.randint(0, 99, (3, 40)), "attention_mask": torch.ones(shape, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"attention_mask has shape {re.escape(str(shape))}.*\(3, 40\)"):
        collect_averages(model, [batch], progress=False)
    with pytest.raises(ValueError, match=rf"attention_mask has shape {re.escape(str(shape))}.*\(3, 40\)"):
        collect_probabilities(model, [batch], GlobalMask.random(2, 2, 40, sparsity=0.5), progress=False)


def test_one_padding_mask_for_all_sequences(model):
    batch = padded_inputs((9, 9, 9))
    batch["attention_mask"][:, 6:] = 0
    short = batch | {"attention_mask": batch["attention_mask"][:1]}
    one, each = (collect_averages(model, [inputs], progress=False) for inputs in (short, batch))
    torch.testing.assert_close(one.sums, each.sums, atol=1e-6, rtol=0)
    assert torch.equal(one.counts, each.counts) and (one.sequences, one.tokens) == (3, 18)


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 9, 9\)"):
        collect_averages(
            model, [{"input_ids": torch.ones(2, 9).long(), "attention_mask": torch.ones(2, 1, 9, 9)}], progress=False
        )
    with pytest.raises(ValueError, match="no batch"):
        collect_averages(model, [], progress=False)
    for shape in ((0, 9), (2, 0)):
        with pytest.raises(ValueError, match=re.escape(f"input_ids has shape {shape}")):
            collect_averages(model, [{"input_ids": torch.ones(shape).long()}], progress=False)
    for max_length, error in ((0, ValueError), (8.0, TypeError)):
        with pytest.raises(error, match=f"max_length is {max_length}, expected a whole number"):
            collect_averages(model, [padded_inputs()], max_length=max_length, progress=False)
    with pytest.raises(TypeError, match="shard is 'no', expected True or False"):
        collect_averages(model, [padded_inputs()], shard="no", progress=False)
    with pytest.raises(ValueError, match="length 20, more than max_length 10"):
        collect_averages(model, [padded_inputs()], max_length=10, progress=False)
    model.encoder.layer[1].attention.self.query.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="nan at layer 1"):
        collect_averages(model, [padded_inputs()], progress=False)
    patch_bert(model, GlobalMask.random(2, 2, 32, sparsity=0.5))
    with pytest.raises(ValueError, match="the model is patched"):
        collect_averages(model, [padded_inputs()], progress=False)
    with pytest.raises(TypeError, match="is not a transformers model"):
        collect_averages(torch.nn.Linear(2, 2), [], progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (padded_inputs(), "batches is one dict, .*pass .batch."),
        (torch.ones(2, 3), "batches is Tensor, expected an iterable"),
        (None, "batches is NoneType, expected an iterable"),
        ([(torch.ones(2, 3),)], "a batch is tuple, expected the model's arguments by name"),
        ([{"input_ids": [[1, 2]]}], "input_ids is list, expected a tensor"),
    ],
)
def test_batches_of_other_types_are_named(model, batches, message):
    with pytest.raises(TypeError, match=message):
        collect_averages(model, batches, progress=False)
    with pytest.raises(TypeError, match=message):
        collect_probabilities(model, batches, GlobalMask.random(2, 2, 20, sparsity=0.5), progress=False)


def test_progress_bar_shows(model, capsys):
    collect_averages(model, [padded_inputs()], progress=True)
    assert "collecting attention" in capsys.readouterr().err
