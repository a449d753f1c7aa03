"""Wrong results are found, right ones are not."""

from dataclasses import replace

import pytest
import torch

from benchmarks.attention_check import Expected
from benchmarks.attention_inputs import Case, Inputs, LayerMask
from benchmarks.attention_workloads import FORWARD, FORWARD_BACKWARD
from benchmarks.verdicts import Wrong
from sparse_attn import sparse_attention
from tests.benchmarks.attention_samples import packed_workload, tiny_workload

CPU = torch.device("cpu")


def make_case(workload, direction=FORWARD, masked=True, bits=None, dtype=torch.float32):
    inputs = Inputs(workload, CPU, dtype, seed=0)
    layer = LayerMask(workload.masks("element", CPU)[0]) if masked else None
    return Case(workload, direction, "element" if masked else "dense", inputs, layer, bits)


def reference(case):
    """Output, and gradients in training, of the package's reference."""
    packed = case.workload.packed
    *inputs, grad_output = case.inputs.tensors(packed)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    layout = LayerMask(torch.ones(2, 64, 64, dtype=torch.bool)).layout if case.layer is None else case.layer.layout
    cu_seqlens = case.inputs.cu_seqlens if packed else None
    output = sparse_attention(*leaves, layout, bits=case.bits, cu_seqlens=cu_seqlens, backend="reference")
    gradients = torch.autograd.grad(output, leaves, grad_output) if case.training else ()
    return [output.detach(), *gradients]


@pytest.mark.parametrize("workload", [tiny_workload(), packed_workload()], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("direction", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_reference_is_right(workload, masked, direction, dtype):
    case = make_case(workload, direction, masked, dtype=dtype)
    assert Expected(case).error(reference(case)) < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("bits", [1, 3])
def test_rounded_probabilities_are_right(bits):
    case = make_case(tiny_workload(), bits=bits)
    assert Expected(case).error(reference(case)) < 1e-5
    with pytest.raises(Wrong, match="relative error"):
        Expected(case).error(reference(replace(case, bits=None)))


@pytest.mark.parametrize("which", range(4))
def test_a_wrong_output_or_gradient_is_found(which):
    case = make_case(tiny_workload(), FORWARD_BACKWARD)
    results = reference(case)
    results[which] = results[which] * 1.01
    with pytest.raises(Wrong, match="relative error 1.0e-02, at most 1e-03"):
        Expected(case).error(results)
    assert Expected(case).error(results, tolerance=0.1) == pytest.approx(0.01, rel=0.01)


def test_attention_to_pruned_positions_is_found():
    case = make_case(tiny_workload())
    with pytest.raises(Wrong, match="relative error"):
        Expected(case).error(reference(make_case(tiny_workload(), masked=False)))


def test_shape_and_finiteness_are_checked_everywhere_but_in_padding():
    case = make_case(packed_workload())
    packed = reference(case)[0]
    padded = torch.zeros(3, 2, 40, 16)
    for index, part in enumerate(packed.split(case.workload.lengths)):
        padded[index, :, : len(part)] = part.transpose(0, 1)
    padded[2, :, 5:] = torch.nan
    assert Expected(case).error([padded]) < 1e-5
    padded[2, 1, 4, 0] = torch.nan
    with pytest.raises(Wrong, match="not finite"):
        Expected(case).error([padded])
    with pytest.raises(Wrong, match="shape"):
        Expected(case).error([packed[:-1]])
