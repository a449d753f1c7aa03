"""Every way to cut a kernel computes the same; tables choose the nearest."""

import json
import warnings

import pytest
import torch

from sparse_attn import SparseLayout, sparse_attention
from sparse_attn.backends import automatic, native_cuda, usual
from sparse_attn.kernels import configuration
from sparse_attn.kernels.configuration import KERNELS, BlockConfig, KernelConfig, Problem, TuningTable
from sparse_attn.quantization import log_table
from tests.helpers import DEVICE, assert_within_budget, gradients, random_inputs

DEVICE_NAME = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
CONFIGS = [
    KernelConfig(rows=16, columns=16, num_warps=4, num_stages=1),
    KernelConfig(rows=32, columns=32, num_warps=4, num_stages=2, held=64),
    KernelConfig(rows=64, columns=16, num_warps=4, num_stages=2, held=16),
    KernelConfig(rows=32, columns=32, num_warps=4, num_stages=2, split=True),
    KernelConfig(rows=16, columns=16, num_warps=4, num_stages=2, held=128, split=True),
    KernelConfig(rows=128, columns=32, num_warps=8, num_stages=1, held=128),
    KernelConfig(rows=16, columns=64, num_warps=4, num_stages=2, split=True),
    KernelConfig(rows=16, columns=128, num_warps=4, num_stages=2, held=512),
]


@pytest.fixture
def use_config(monkeypatch):
    """A function that makes every kernel run with one configuration."""
    monkeypatch.setattr(configuration, "_used", {})

    def use(config: KernelConfig) -> None:
        entries = [
            (Problem(kernel, rounded, 256, size, 64, 2.0), config)
            for kernel in KERNELS
            for rounded in (False, True)
            for size in (2, 4)
        ]
        configuration.use_table(TuningTable(DEVICE_NAME, tuple(entries)))

    return use


def striped_layout(length: int) -> SparseLayout:
    """A random mask with keys that every query keeps, and a head that is as full as a tile mask."""
    keep = torch.rand(3, length, length) < 0.2
    keep[:, :, 5::9] = True
    keep[2] = keep[2, 0]
    return SparseLayout(keep.to(DEVICE))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, vars(config).values())))
def test_every_configuration_computes_the_same(config, use_config, poisoned):
    use_config(config)
    length = 70
    rows_alike = SparseLayout(torch.ones(1, length, length, dtype=torch.bool).to(DEVICE))
    layout = striped_layout(length)
    lengths = torch.tensor([length, 37], device=DEVICE)
    inputs = random_inputs((2, 3, length, 32), torch.float32, DEVICE)
    for used in (layout, rows_alike):
        tensors = [tensor[:, : used.heads] for tensor in inputs]
        for arguments in (
            {},
            dict(bits=3, key_lengths=lengths, query_lengths=lengths),
            dict(causal=True, key_padding_mask=torch.rand(2, length, device=DEVICE) < 0.7),
        ):
            result = sparse_attention(*tensors, used, backend="triton", **arguments)
            assert_within_budget(result, *tensors, used, **arguments)
    tensors, sizes = layout.arguments["triton", 32, torch.float32, log_table(3), False]
    assert len(tensors) == 4 and sizes[1:4] == (config.rows, config.columns, config.num_warps)
    assert tensors[0].shape[1] == 1 + config.split


@pytest.mark.parametrize("config", CONFIGS[2:5], ids=lambda config: "-".join(map(str, vars(config).values())))
def test_gradients_with_every_kind_of_list(config, use_config, poisoned):
    use_config(config)
    layout, tensors = striped_layout(44), random_inputs((2, 3, 44, 32), torch.float32, DEVICE)
    grad_output = torch.randn_like(tensors[0])
    for arguments in (dict(bits=3, dropout=0.2), dict(key_lengths=torch.tensor([44, 17], device=DEVICE))):
        ours = gradients(tensors, layout, grad_output, "triton", **arguments)
        exact = gradients(tensors, layout, grad_output, "reference", **arguments)
        for own, true in zip(ours, exact, strict=True):
            torch.testing.assert_close(own, true, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS[:4:3], ids=["one part", "two parts"])
def test_an_offset_far_from_the_first_group(config, use_config):
    use_config(config)
    layout = striped_layout(150)
    query, key, value = random_inputs((2, 3, 150, 32), torch.float32, DEVICE)
    for offset in (5, 64, 149):
        rows = query[:, :, : 150 - offset]
        arguments = dict(causal=True, query_offset=offset)
        result = sparse_attention(rows, key, value, layout, backend="triton", **arguments)
        assert_within_budget(result, rows, key, value, layout, **arguments)


def test_the_nearest_problem_decides():
    def problem(**changes):
        usual = dict(kernel="forward", rounded=False, head_dim=64, element_bytes=2, key_len=384, spread=2.0)
        return Problem(**{**usual, **changes})

    configs = [KernelConfig(16, 16, 4, stages) for stages in range(1, 6)]
    known = [problem(), problem(key_len=4096), problem(spread=1.1), problem(head_dim=128), problem(rounded=True)]
    table = TuningTable("cpu", tuple(zip(known, configs)))
    assert [table.nearest(one) for one in known] == configs
    assert table.nearest(problem(key_len=512, head_dim=40)) == configs[0]
    assert table.nearest(problem(key_len=16384, head_dim=33)) == configs[1]
    assert table.nearest(problem(spread=1.0, key_len=512)) == configs[2]
    assert table.nearest(problem(head_dim=65, spread=1.0)) == configs[3]
    assert table.nearest(problem(head_dim=129)) is None
    assert table.nearest(problem(element_bytes=4)) is None


def test_the_default_table_serves_every_problem():
    for kernel in KERNELS:
        for rounded in (False, True) if kernel == "forward" else (False,):
            for head_dim in (1, 33, 96, 256):
                for size in (2, 4):
                    config = configuration.choose(
                        Problem(kernel, rounded, head_dim, size, 100, 1.5), torch.device("cpu")
                    )
                    assert config.rows in (16, 32, 64, 128)
    with pytest.raises(ValueError, match="no configuration of forward for head_dim 257"):
        configuration.choose(Problem("forward", False, 257, 2, 100, 1.5), torch.device("cpu"))


@pytest.fixture
def some_gpu(monkeypatch):
    """Configurations are chosen for a GPU called "Some GPU 1" of architecture sm_90, and no table is in use."""
    monkeypatch.setattr(configuration, "_used", {})
    monkeypatch.setattr(configuration, "_measured_tables", lambda: ())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda", 0)


def test_a_gpu_without_a_table_is_told_once(some_gpu):
    configuration._warn_untuned.cache_clear()
    problem = Problem("forward", False, 64, 2, 384, 2.0)
    with pytest.warns(UserWarning, match="not been tuned for Some GPU 1"):
        default = configuration.choose(problem, some_gpu)
    other = KernelConfig(16, 64, 2, 5)
    configuration.use_table(TuningTable("Some GPU 1", ((problem, other),)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configuration.choose(problem, some_gpu) == other != default
        fp32 = Problem("forward", False, 64, 4, 384, 2.0)  # not in the table: the default serves
        assert configuration.choose(fp32, some_gpu) == configuration.default_table().nearest(fp32)


def test_a_gpu_of_the_same_architecture_lends_its_table(some_gpu, monkeypatch):
    problem = Problem("forward", False, 64, 2, 384, 2.0)

    def table(device: str, architecture: str, stages: int) -> TuningTable:
        config, native = KernelConfig(16, 64, 2, stages), BlockConfig(stages, faster=True)
        return TuningTable(device, ((problem, config),), ((problem, native),), architecture)

    other, kin, own = table("Old GPU", "sm_80", 3), table("Some GPU 0", "sm_90", 4), table("Some GPU 1", "sm_90", 5)
    for tables, stages in (((other, kin), 4), ((other, kin, own), 5)):
        monkeypatch.setattr(configuration, "_measured_tables", lambda tables=tables: tables)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert configuration.choose(problem, some_gpu).num_stages == stages
            assert configuration.choose_native(problem, some_gpu).warps == stages
    monkeypatch.setattr(configuration, "_measured_tables", lambda: (other,))
    assert configuration.table_of(some_gpu) is None


def test_tables_are_read_and_refused(tmp_path):
    problem, config = Problem("forward", True, 64, 2, 384, 2.1), KernelConfig(32, 64, 4, 3, held=256)
    path = tmp_path / configuration.table_name("NVIDIA H200")
    assert path.name == "nvidia-h200.json"
    entries = [configuration.entry(problem, config, p50_ms=1.0)]
    content = {"device": "NVIDIA H200", "architecture": "sm_90", "entries": entries}
    path.write_text(json.dumps(content))
    assert configuration.read_table(path) == TuningTable("NVIDIA H200", ((problem, config),), architecture="sm_90")
    del content["entries"][0]["rows"]
    for text in (json.dumps(content), "{", "[]", '{"entries": []}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="nvidia-h200.json is not a tuning table"):
            configuration.read_table(path)


def test_shipped_tables_are_whole():
    for path in configuration.TABLES.glob("*.json"):
        for problem, config in configuration.read_table(path).entries:
            assert problem.kernel in KERNELS and 1.0 <= problem.spread <= 4.0, path.name
            assert config.held & (config.held - 1) == 0 and config.rows in (16, 32, 64, 128), path.name
            assert problem.kernel == "forward" or not (problem.rounded or config.held), path.name


def test_native_entries_say_what_is_faster(some_gpu, monkeypatch):
    """backend="auto" takes the native kernel first only where the table of the GPU says that it was faster."""
    monkeypatch.setattr(native_cuda, "built", lambda: True)
    element, rounded = (Problem("forward", bits, 64, 2, 384, 2.0) for bits in (False, True))
    assert configuration.choose_native(element, some_gpu) == BlockConfig(12)
    best = BlockConfig(4, 2, faster=True)
    configuration.use_table(TuningTable("Some GPU 1", (), ((element, best), (rounded, BlockConfig(12, 1)))))
    assert configuration.choose_native(element, some_gpu) == best

    def order(head_dim=64, dtype=torch.float16, bits=False, training=False) -> tuple[str, ...]:
        layout = SparseLayout(torch.rand(1, 384, 384) < 0.1)
        assert layout.spread > 1  # counted before it says that it is on a GPU
        layout.device = some_gpu
        return automatic(layout, head_dim, dtype, bits, training)

    native_first, otherwise = ("native", "triton", "torch", "reference"), usual(torch.device("cuda"))
    assert order() == native_first
    assert order(bits=True) == order(training=True) == order(dtype=torch.float32) == order(head_dim=48) == otherwise
    both = ((Problem("backward", False, 64, 2, 384, 2.0), BlockConfig(8, faster=True)),)
    configuration.use_table(TuningTable("Some GPU 1", (), both))
    assert order(training=True) == native_first and order() == order(bits=True, training=True) == otherwise
