"""The tensors of a tuning problem on a device, and its kernel launched on them with any configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from sparse_attn import SparseLayout, sparse_attention
from sparse_attn.backends import native_cuda
from sparse_attn.kernels import launch
from sparse_attn.kernels.configuration import BlockConfig, KernelConfig, Problem, default_table
from sparse_attn.ops import AttentionCall, empty_output
from sparse_attn.quantization import as_table

from ..verdicts import Wrong
from .candidates import ListFacts
from .problems import TuningProblem

# Largest relative error, ||result - other|| / ||other||, by element size: of the default configuration compared with
# another backend in float32, and of a candidate compared with the default one.
_DEFAULT_LIMIT = {2: 1e-2, 4: 1e-3}
_CANDIDATE_LIMIT = {2: 5e-3, 4: 1e-4}


Arguments = Callable[[SparseLayout], tuple[list[Tensor], tuple[int, ...]]]  # lists, and what else a backend wants


class Layouts:
    """Layouts of typical layers of workloads' masks, each compiled once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._layouts: dict[tuple[str, str], list[SparseLayout]] = {}

    def of(self, problem: TuningProblem) -> list[SparseLayout]:
        workload, mask = problem.workload, problem.mask
        if (workload.name, mask) not in self._layouts:
            if mask == "dense":
                keeps = torch.ones(1, workload.heads, workload.length, workload.length, dtype=torch.bool)
                keeps = keeps.to(self._device)
            else:
                keeps = workload.masks(mask, self._device)
            layouts = [SparseLayout(keep) for keep in keeps]
            self._layouts[workload.name, mask] = [layouts[index] for index in typical_layers(layouts)]
        return self._layouts[workload.name, mask]


def typical_layers(layouts: Sequence[SparseLayout]) -> list[int]:
    """The layers whose work in groups of 64 queries is next to the mean of all: one below it and one above it."""
    works = [layout.work(64) for layout in layouts]
    mean = sum(works) / len(works)
    below = max((index for index, work in enumerate(works) if work <= mean), key=works.__getitem__, default=0)
    above = min((index for index, work in enumerate(works) if work >= mean), key=works.__getitem__, default=below)
    return sorted({below, above})


@dataclass(frozen=True)
class _Layer:
    """What the kernels of one layer write: tensors like the query, and one number a row in `lse` and `delta`."""

    layout: SparseLayout
    output: Tensor
    lse: Tensor
    delta: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


class Bench:
    """A tuning problem on a device.

    Attributes:
        tuned: the problem.
        problem: its key in a table.
        default: the configuration that the package ships for all devices.
    """

    def __init__(self, tuned: TuningProblem, device: torch.device, layouts: Sequence[SparseLayout]):
        self.tuned = tuned
        workload = tuned.workload
        shape = (4, workload.batch, workload.length, workload.heads, tuned.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        drawn = torch.randn(shape, generator=generator, device=device).to(tuned.dtype)
        # Strides as transformers passes them: heads beside tokens in memory.
        self._query, self._key, self._value, self._grad_output = drawn.transpose(2, 3).unbind(0)
        self._call = AttentionCall(
            query=self._query, key=self._key, value=self._value, layout=[], layout_sizes=(), query_lengths=None,
            key_lengths=None, key_padding=None, cu_seqlens=None, max_length=0, seed=None, scale=tuned.head_dim**-0.5,
            table=as_table(tuned.bits), causal=False, query_offset=0, dropout=0.0, need_lse=False,
        )  # fmt: skip
        self._layers = [_empty_layer(layout, self._query) for layout in layouts]
        self._expected: list[list[Tensor]] = []
        work_64, work_16 = (sum(layout.work(rows) for layout in layouts) for rows in (64, 16))
        self.problem = self._problem(tuned.kernel, work_64 / work_16, layouts[0].key_len)
        self.default = default_table().nearest(self.problem)

    def facts(self, rows: int) -> ListFacts:
        """What the lists for groups of `rows` look like."""
        every = [layer.layout.step_lists(rows, transposed=self._transposed) for layer in self._layers]
        lengths = torch.cat([lists.stops[:, 0, -1] - lists.stops[:, 0, 0] for lists in every])
        split = [layer.layout.step_lists(rows, transposed=self._transposed, split=True) for layer in self._layers]
        splits = any(lists.stops.shape[1] == 2 for lists in split)
        return ListFacts(int(lengths.min()), int(lengths.max()), splits)

    def launch(self, config: KernelConfig) -> None:
        """Runs the kernel on all layers."""
        for layer in self._layers:
            self._launch(self.tuned.kernel, config, layer)

    def launch_defaults(self) -> None:
        """Runs, with default configurations, what the kernel's own inputs come from, and the kernel itself."""
        for layer in self._layers:
            if self.tuned.kernel != "forward":
                self._launch("forward", self._default_of("forward"), layer, store_lse=True)
            if self.tuned.kernel == "grad_key_value":
                self._launch("grad_query", self._default_of("grad_query"), layer)
            self._launch(self.tuned.kernel, self.default, layer)

    def prepare(self) -> None:
        """Runs the default configuration, whose results candidates are compared with.

        Raises Wrong where they differ from those of another backend.
        """
        self.launch_defaults()
        self._expected = [[tensor.clone() for tensor in self._results(layer)] for layer in self._layers]
        for layer, expected in zip(self._layers, self._expected, strict=True):
            for own, other in zip(expected, self._by_another_backend(layer.layout), strict=False):
                compare(own, other, _DEFAULT_LIMIT[self.tuned.dtype.itemsize], "another backend's result")

    def check(self, config: KernelConfig) -> None:
        """Raises Wrong where a configuration computes something else than the default one, or not everything."""
        for layer in self._layers:
            for tensor in self._results(layer):
                tensor.fill_(float("nan"))
        self.launch(config)
        self.compare()

    def compare(self) -> None:
        """Raises Wrong where what was computed last is not what the default configuration computes."""
        for layer, expected in zip(self._layers, self._expected, strict=True):
            for own, other in zip(self._results(layer), expected, strict=True):
                compare(own, other, _CANDIDATE_LIMIT[self.tuned.dtype.itemsize], "the default configuration's")

    def caller(self, config: KernelConfig) -> Callable[[], None]:
        return partial(self.launch, config)

    def native_caller(self, config: BlockConfig) -> Callable[[], list[Tensor]]:
        """A function that runs the native kernel on all layers and returns its outputs."""
        calls = []
        for layer in self._layers:
            lists, sizes = native_cuda.configured_arguments(layer.layout, self.tuned.head_dim, self.tuned.dtype, config)
            calls.append(replace(self._call, layout=lists, layout_sizes=sizes))
        return lambda: [native_cuda.forward(call)[0] for call in calls]

    def training_caller(self, backend: ModuleType, arguments: Arguments) -> Callable[[], list[Tensor]]:
        """A function that runs a backend's forward and backward passes on all layers and returns the gradients.
        `arguments` yields what the backend wants of a layout."""
        calls = []
        for layer in self._layers:
            lists, sizes = arguments(layer.layout)
            calls.append(replace(self._call, layout=lists, layout_sizes=sizes, need_lse=True))
        return lambda: [
            gradient for call in calls for gradient in backend.backward(call, *backend.forward(call), self._grad_output)
        ]

    def compare_outputs(self, outputs: Sequence[Tensor], limit: float) -> None:
        """Raises Wrong where outputs of the forward pass are not those of the default configuration."""
        for own, (other,) in zip(outputs, self._expected, strict=True):
            compare(own, other, limit, "the Triton kernel's")

    @property
    def layers(self) -> int:
        """How many layers a call computes."""
        return len(self._layers)

    @property
    def _transposed(self) -> bool:
        return self.tuned.kernel == "grad_key_value"

    def _problem(self, kernel: str, spread: float, key_len: int) -> Problem:
        rounded = kernel == "forward" and self.tuned.bits is not None
        return Problem(kernel, rounded, self.tuned.head_dim, self.tuned.dtype.itemsize, key_len, spread)

    def _default_of(self, kernel: str) -> KernelConfig:
        return default_table().nearest(self._problem(kernel, self.problem.spread, self.problem.key_len))

    def _launch(self, kernel: str, config: KernelConfig, layer: _Layer, store_lse: bool = False) -> None:
        call = self._call
        lists = layer.layout.step_lists(config.rows, transposed=kernel == "grad_key_value", split=config.split)
        if kernel == "forward":
            launch.forward(call, layer.output, layer.lse if store_lse else layer.lse[:0], lists, config)
        elif kernel == "grad_query":
            launch.backward_query(
                call, layer.output, layer.lse, layer.delta, self._grad_output, layer.grad_query, lists, config
            )
        else:
            gradients = (layer.grad_key, layer.grad_value)
            launch.backward_key_value(call, layer.lse, layer.delta, self._grad_output, gradients, lists, config)

    def _results(self, layer: _Layer) -> tuple[Tensor, ...]:
        """What the kernel writes."""
        return {
            "forward": (layer.output,),
            "grad_query": (layer.grad_query, layer.delta),
            "grad_key_value": (layer.grad_key, layer.grad_value),
        }[self.tuned.kernel]

    def _by_another_backend(self, layout: SparseLayout) -> list[Tensor]:
        """The results by torch's operations in float32; without delta, which other backends do not make."""
        leaves = [tensor.float() for tensor in (self._query, self._key, self._value)]
        if self.tuned.kernel == "forward":
            # With lse, it writes out the probabilities: no fused kernel with a precision of its own.
            return [sparse_attention(*leaves, layout, bits=self.tuned.bits, return_lse=True, backend="torch")[0]]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        output = sparse_attention(*leaves, layout, backend="torch")
        gradients = torch.autograd.grad(output, leaves, self._grad_output.float())
        return [gradients[0]] if self.tuned.kernel == "grad_query" else list(gradients[1:])


def _empty_layer(layout: SparseLayout, query: Tensor) -> _Layer:
    rows = query.new_empty(query.shape[:3], dtype=torch.float32)
    gradients = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(3)]
    return _Layer(layout, empty_output(query, packed=False), rows, torch.empty_like(rows), *gradients)


def compare(own: Tensor, other: Tensor, limit: float, name: str) -> None:
    """Raises Wrong where two results differ by more than `limit`, relative to the norm of the other one."""
    error = (torch.linalg.vector_norm(own.float() - other) / torch.linalg.vector_norm(other.float())).item()
    if not error <= limit:  # NaN is not
        raise Wrong(f"relative difference {error:.1e} to {name}, at most {limit:.0e} expected")
