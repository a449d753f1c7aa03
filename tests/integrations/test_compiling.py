"""Patched models under torch.compile and in CUDA graphs."""

import pytest
import torch

from sparse_attn import GlobalMask, patch_bert
from sparse_attn.integrations import unpadding
from tests.helpers import DEVICE
from tests.integrations.conftest import close, inputs_of, run

MASK = GlobalMask.random(2, 2, 32, sparsity=0.7)


@pytest.fixture
def model(model):
    """The small BERT on the GPU where there is one, else on the CPU with Triton's interpreter."""
    return model.to(DEVICE)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_as_one_graph_for_any_length(model, backend):
    patch_bert(model, MASK, bits=3, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((20, 13), (31, 2), (9, 9)):
        inputs = inputs_of(lengths)
        close(run(compiled, inputs).last_hidden_state, run(model, inputs).last_hidden_state, inputs)
    if backend == "auto":
        inputs.pop("attention_mask")
        torch.testing.assert_close(run(compiled, inputs).last_hidden_state, run(model, inputs).last_hidden_state)


@pytest.mark.parametrize("unpad", [True, False])
def test_layers_compiled_one_by_one_are_compiled_once(model, unpad):
    patch_bert(model, MASK, unpad=unpad)
    batches = [inputs_of(lengths) for lengths in ((20, 13), (31, 2))]
    expected = [run(model, inputs).last_hidden_state for inputs in batches]
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return graph

    for layer in model.encoder.layer:
        layer.compile(backend=compiler, dynamic=True)
    for inputs, output in zip(batches, expected, strict=True):
        close(run(model, inputs).last_hidden_state, output, inputs)
    assert len(model.encoder.layer) > len(graphs) == 1


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compiled_passes_have_gradients(model, mode):
    """A traced pass finds its lists, also in evaluation mode, where weights ask for gradients all the same."""
    del model.encoder.layer[1:]  # one compiles faster
    model.config.num_hidden_layers = 1
    patch_bert(getattr(model, mode)(), GlobalMask(MASK.keep[:1]))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(**inputs_of()).last_hidden_state.square().sum().backward()
    assert model.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def is_cuda(self):
        return True


def test_a_traced_model_serves_other_padding(model):
    model.config.return_dict = False
    patch_bert(model, MASK)
    for traced_with, lengths in (((32, 32), (32, 10)), ((32, 20), (32, 32))):
        example, inputs = (tuple(inputs_of(own).values()) for own in (traced_with, lengths))
        with torch.no_grad():
            traced = torch.jit.trace(model, example, strict=False)
            own, expected = traced(*inputs)[0], model(*inputs)[0]
        real = inputs[1].bool()
        torch.testing.assert_close(own[real], expected[real])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_serves_other_shapes(model, strict):
    patch_bert(model, MASK)
    batch, length = torch.export.Dim("batch", min=2, max=16), torch.export.Dim("length", min=2, max=32)
    shapes = {name: {0: batch, 1: length} for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs_of((31, 20, 7)), dynamic_shapes=shapes, strict=strict
        )  # fmt: skip
    inputs = inputs_of((20, 9))
    exported = program.module()(**inputs).last_hidden_state
    close(exported, run(model, inputs).last_hidden_state, inputs)


def test_unpadding_while_a_cuda_graph_is_captured(monkeypatch):
    """Refused by name; but torch.compile cannot trace the question and gets its answer without."""
    stack = torch.nn.Module().eval()
    stack.sparse_attention_unpad, stack.sparse_attention_chunking = None, ()
    hidden = torch.zeros(1).as_subclass(OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph is being captured.*unpad=False"):
        unpadding._possible(stack, hidden, {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert unpadding._possible(stack, hidden, {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not unpadding._possible(stack, hidden, {})


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("mode", ["graph", "reduce-overhead"])
def test_captured_in_a_cuda_graph(model, mode):
    """A captured pass computes new inputs of the same shape: nothing of it looks at values on the host. Compiled code
    rounds float16 at other places, which may move a probability over the edge of a bin: there are none then."""
    bits, unpad = (3, False) if mode == "graph" else (None, None)
    patch_bert(model.half(), MASK, bits=bits, unpad=unpad)
    inputs = inputs_of()
    if mode == "reduce-overhead":
        torch._dynamo.reset()
        replay = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):
            run(replay, inputs)
    else:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(model, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(model, inputs)

        def replay(**_):
            graph.replay()
            return captured

    for lengths in ((20, 7, 3), (20, 20, 19)):
        for name, value in inputs_of(lengths).items():
            inputs[name].copy_(value)
        close(run(replay, inputs).last_hidden_state, run(model, inputs).last_hidden_state, inputs, atol=1e-2)
