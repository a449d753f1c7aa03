"""The C++ kernels for CPUs: every instruction set, threads, processes."""

import multiprocessing
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sparse_attn import QuantizationTable, SparseLayout, extension, log_table, sparse_attention
from sparse_attn.backends import native_cpu, row_lists
from tests.helpers import assert_within_budget, gradients, random_inputs, random_layout

pytestmark = [
    pytest.mark.skipif(not extension.available(), reason="the C++ extension is not built"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(params=native_cpu.instruction_sets())
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(native_cpu, "_instruction_set", request.param)
    return request.param


def assert_gradients_are(own: torch.Tensor, true: torch.Tensor) -> None:
    assert (own.double() - true).norm() <= 8 * torch.finfo(own.dtype).eps * true.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [96, 64, 40, 3])
def test_every_instruction_set_computes_the_same(instruction_set, dtype, head_dim):
    query, key, value = random_inputs((2, 3, 75, head_dim), dtype, "cpu")
    lengths = torch.tensor([75, 29])
    for granularity in ("element", "tile"):
        layout = random_layout(3, 80, 0.7, "cpu", granularity)
        for arguments in (
            {},
            dict(bits=3, key_lengths=lengths, query_lengths=lengths),
            dict(bits=5, causal=True),
            dict(bits=QuantizationTable(1e-2, (0.0, 0.03, 0.2, 0.7)), key_padding_mask=torch.rand(2, 75) < 0.6),
            dict(bits=QuantizationTable(1e-3, tuple(2 * level for level in log_table(6).levels))),
        ):
            result = sparse_attention(query, key, value, layout, backend="native", **arguments)
            assert_within_budget(result, query, key, value, layout, **arguments)


DTYPES_IN_LISTS = [(torch.float32, 72), (torch.float16, 40), (torch.bfloat16, 96)]  # the last one in pairs


@pytest.mark.parametrize("few_rows", [0, 3, 16])
@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_IN_LISTS)
def test_shared_and_row_lists_compute_the_same(instruction_set, dtype, head_dim, few_rows, monkeypatch):
    """Lists for all rows of a group, for each row of its own, and both."""
    monkeypatch.setattr(row_lists, "FEW_ROWS", few_rows)
    layout, lengths = random_layout(3, 80, 0.8, "cpu"), torch.tensor([75, 29])
    tensors = random_inputs((2, 3, 75, head_dim), dtype, "cpu")
    hidden = torch.rand(2, 75) < 0.6
    for arguments in (
        {},
        dict(bits=3, key_lengths=lengths, query_lengths=lengths),
        dict(causal=True, key_padding_mask=hidden),
    ):
        result = sparse_attention(*tensors, layout, backend="native", **arguments)
        assert_within_budget(result, *tensors, layout, **arguments)
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(1)
        results.append(sparse_attention(*tensors, layout, backend=backend, dropout=0.3, key_lengths=lengths))
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 24])
def test_every_instruction_set_reads_parts_of_larger_tensors(instruction_set, dtype, head_dim):
    """Packed sequences, one of them empty, and a few queries behind an offset; forward and backward."""
    layout, lengths = random_layout(2, 48, 0.6, "cpu"), (17, 0, 40, 1)
    wide = torch.randn(3, sum(lengths), 2, 2 * head_dim + 3).to(dtype)
    packed = [tensor[..., 1 : 1 + head_dim] for tensor in wide]
    arguments = dict(cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(), bits=3)
    own = sparse_attention(*packed, layout, backend="native", **arguments)
    grad_output = torch.randn(sum(lengths), 2, 2 * head_dim).to(dtype)[..., ::2]
    grads = gradients(packed, layout, grad_output, "native", **arguments)
    for end, length in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths, strict=True):
        if length == 0:
            continue
        part = slice(end - length, end)
        alone = [tensor[part].transpose(0, 1).unsqueeze(0) for tensor in (*packed, grad_output)]
        assert_within_budget(own[part].transpose(0, 1).unsqueeze(0), *alone[:3], layout, bits=3)
        own_grads = gradients(alone[:3], layout, alone[3], "native", bits=3)
        for grad, apart in zip(grads, own_grads, strict=True):
            assert torch.equal(grad[part].transpose(0, 1), apart[0])
    query, key, value = (tensor[:40].transpose(0, 1).unsqueeze(0) for tensor in packed)
    arguments = dict(causal=True, query_offset=33)
    result = sparse_attention(query[:, :, 33:], key, value, layout, backend="native", **arguments)
    assert_within_budget(result, query[:, :, 33:], key, value, layout, **arguments)


@pytest.mark.parametrize("arguments", [{}, dict(bits=3, dropout=0.3), dict(causal=True, bits=6)])
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 24), (torch.bfloat16, 32), (torch.bfloat16, 96)])
def test_every_instruction_set_has_the_same_gradients(instruction_set, dtype, head_dim, arguments):
    layout = random_layout(2, 80, 0.6, "cpu")
    tensors = random_inputs((2, 2, 75, head_dim), dtype, "cpu")
    grad_output = torch.randn_like(tensors[0])
    arguments = dict(arguments, key_lengths=torch.tensor([75, 18]), key_padding_mask=torch.rand(2, 75) < 0.8)
    ours = gradients(tensors, layout, grad_output, "native", **arguments)
    exact = gradients([t.double() for t in tensors], layout, grad_output.double(), "reference", **arguments)
    for own, true in zip(ours, exact, strict=True):
        assert_gradients_are(own, true)


@pytest.mark.parametrize("few_rows", [0, 3, 16])
@pytest.mark.parametrize("sparsity", [0.05, 0.8])
@pytest.mark.parametrize(("dtype", "head_dim"), DTYPES_IN_LISTS)
def test_shared_and_row_lists_have_the_same_gradients(
    instruction_set, dtype, head_dim, sparsity, few_rows, monkeypatch
):
    """Keys that end within a group, queries within its list, and rounding and dropout of single positions."""
    monkeypatch.setattr(row_lists, "FEW_ROWS", few_rows)
    layout, lengths = random_layout(2, 80, sparsity, "cpu"), torch.tensor([75, 61])
    tensors = random_inputs((2, 2, 75, head_dim), dtype, "cpu")
    grad_output = torch.randn_like(tensors[0])
    for arguments in ({}, dict(bits=3, dropout=0.3), dict(key_lengths=lengths), dict(query_lengths=lengths, bits=2)):
        ours = gradients(tensors, layout, grad_output, "native", **arguments)
        exact = gradients([t.double() for t in tensors], layout, grad_output.double(), "reference", **arguments)
        for own, true in zip(ours, exact, strict=True):
            assert_gradients_are(own, true)


def test_row_lists_of_a_longer_mask(instruction_set):
    """What lies beyond a sequence, most of a mask whose last quarter keeps more, has no place among its scores."""
    keep = torch.rand(1, 640, 640) < 0.01
    keep[:, 481:] |= torch.rand(1, 159, 640) < 0.2
    layout, tensors = SparseLayout(keep), random_inputs((1, 1, 481, 16), torch.float32, "cpu")
    ours = gradients(tensors, layout, tensors[0], "native")
    exact = gradients([t.double() for t in tensors], layout, tensors[0].double(), "reference")
    for own, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(own.double(), true, atol=1e-5, rtol=1e-4)


def test_conversions_round_like_torch(instruction_set):
    """One key with weight 1 hands its value through: what comes out is the value in the dtype, rounded to nearest."""
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e6, 6e-8, 2.9e-8, 3.1e-8, 6.1e-5, 5.9e-5, 1e-30, 3.3e38]
    exact = torch.cat([torch.tensor(special), torch.randn(50) * 10.0 ** torch.randint(-9, 6, (50,))])
    layout = random_layout(1, 1, 0.0, "cpu")
    for dtype in (torch.float16, torch.bfloat16):
        value = exact.to(dtype).nan_to_num(posinf=60000.0, neginf=-60000.0).view(1, 1, 1, -1)
        key = torch.zeros_like(value)
        assert torch.equal(sparse_attention(key, key, value, layout, backend="native"), value)
        # Half of one key and half of another: their mean needs rounding.
        pair = torch.stack((value, value.roll(1, -1)), dim=2).view(1, 1, 2, -1)
        zeros = torch.zeros_like(pair)
        result = sparse_attention(zeros, zeros, pair, random_layout(1, 2, 0.0, "cpu"), backend="native")
        assert torch.equal(result[0, 0, 0], pair[0, 0].float().mean(0).to(dtype))


def test_threads_do_not_change_results():
    layout = random_layout(3, 200, 0.8, "cpu")
    tensors = random_inputs((2, 3, 200, 64), torch.float32, "cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(tensors, layout, tensors[0], "native", bits=3, dropout=0.2))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(own, first) for own, first in zip(result, results[0]))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list a process' threads")
@pytest.mark.parametrize("threads", [1, 3])
def test_has_as_many_threads_as_torch_is_told(threads):
    """In a thread that has had no call yet, so that the others it needs are started."""
    layout, tensors = random_layout(3, 200, 0.8, "cpu"), random_inputs((2, 3, 200, 64), torch.float32, "cpu")

    def started() -> int:
        torch.set_num_threads(threads)
        before = len(os.listdir("/proc/self/task"))
        sparse_attention(*tensors, layout, backend="native")
        return len(os.listdir("/proc/self/task")) - before

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(started).result() == threads - 1
    finally:
        torch.set_num_threads(before)


def test_several_python_threads_at_once():
    layout = random_layout(2, 100, 0.8, "cpu")
    cases = [random_inputs((2, 2, 100, 32), torch.float32, "cpu") for _ in range(8)]

    def attend(tensors):
        with torch.inference_mode():
            return sparse_attention(*tensors, layout, backend="native")

    expected = [attend(tensors) for tensors in cases]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attend, cases * 4))
    assert all(torch.equal(own, true) for own, true in zip(found, expected * 4))


def _attend_in_child(tensors, layout, queue):
    results = gradients(tensors, layout, tensors[0], "native")
    queue.put([result.numpy() for result in results] + [torch.get_num_threads()])


def test_works_after_a_fork():
    """A forked process has none of its parent's threads; with more than one, torch's own operators wait for them."""
    layout, tensors = random_layout(2, 60, 0.8, "cpu"), random_inputs((1, 2, 60, 32), torch.float32, "cpu")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        expected = gradients(tensors, layout, tensors[0], "native")
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_attend_in_child, args=(tensors, layout, queue), daemon=True)
        child.start()
        *found, threads = queue.get(timeout=60)
        child.join()
    finally:
        torch.set_num_threads(before)
    assert threads == 3
    assert all(torch.equal(torch.from_numpy(own), true) for own, true in zip(found, expected, strict=True))


def test_shapes_without_elements():
    layout = random_layout(2, 20, 0.5, "cpu")
    for batch, length in ((0, 5), (2, 0)):
        tensors = random_inputs((batch, 2, length, 16), torch.float32, "cpu")
        assert sparse_attention(*tensors, layout, backend="native").shape == (batch, 2, length, 16)
        assert all(one.shape == (batch, 2, length, 16) for one in gradients(tensors, layout, tensors[0], "native"))


@pytest.mark.parametrize(
    ("bounds", "promised", "error"),
    [([0, 40], 8, "max_length is 8"), ([0, 41, 40], 48, "max_length is 48"), ([0, 20, 10, 40], 48, "max_length is 48")]
    + [(bounds, 48, "end with the number of tokens, 40") for bounds in ([0, 41], [-1, 40], [1, 40], [0, 10, 30])],
)
def test_a_traced_call_knows_all_memory_that_it_reads_or_writes(bounds, promised, error, monkeypatch):
    """Nobody looks at cu_seqlens while a call is traced: the kernels' operator does."""
    monkeypatch.setattr("sparse_attn.attention.packed_length", lambda cu_seqlens, max_length, tokens: max_length)
    layout, tensors = random_layout(2, 64, 0.5, "cpu"), random_inputs((40, 2, 16), torch.float32, "cpu")
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = dict(cu_seqlens=cu_seqlens, max_length=promised, backend="native")
    with pytest.raises(RuntimeError, match=error):
        sparse_attention(*tensors, layout, **packed)


def test_another_default_device_changes_nothing():
    layout, tensors = random_layout(2, 20, 0.5, "cpu"), random_inputs((1, 2, 20, 16), torch.float32, "cpu")
    with torch.device("meta"):
        inside = sparse_attention(*tensors, layout, bits=6, backend="native")
    assert torch.equal(sparse_attention(*tensors, layout, bits=6, backend="native"), inside)


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setattr(native_cpu, "_instruction_set", "avx1024")
    with pytest.raises(RuntimeError, match="no kernels for the instruction set avx1024"):
        sparse_attention(*random_inputs((1, 1, 4, 16), torch.float32, "cpu"), random_layout(1, 4, 0.0, "cpu"))


def test_capabilities_name_what_this_processor_has():
    found = native_cpu.instruction_sets()
    assert found[-1] == "portable"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    assert ("avx512" in found) == (flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"})
    if "amx" in found:  # a system may have AMX and keep it from a process
        assert flags >= {"amx_tile", "amx_bf16", "avx512_bf16"}
    if "avx512_bf16" in found:  # Intel's processors multiply pairs of bfloat16 slower than floats
        assert (found.index("avx512") < found.index("avx512_bf16")) == ("GenuineIntel" in flags)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_the_kernels_for_amx_multiply_tiles_in_both_products():
    """Scores take two products, a tile of 16 keys each; outputs four for 64 dimensions or two for 32."""
    library = next(Path(extension.__file__).parent.glob("_C*.so"))
    if b"amx_emulated" in library.read_bytes():
        pytest.skip("this build emulates AMX")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", library]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"ldtilecfg", "tilerelease"} <= set(re.findall(r"\b(?:ldtilecfg|tilerelease)\b", assembly))
    products = set(re.findall(r"tdpbf16ps %(tmm\d),%(tmm\d),%(tmm\d)", assembly))  # B, A, sum
    assert products == {("tmm4", "tmm5", "tmm0"), ("tmm4", "tmm6", "tmm1")} | {
        (f"tmm{values}", "tmm4", f"tmm{tile}") for tile, values in enumerate((5, 6, 7, 5))
    }
