"""Which operators of torch a pass calls, for tests of oneDNN's."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ONEDNN, LINEAR = "mkldnn._linear_pointwise.default", "aten.addmm.default"
GELU, TANH = "aten.gelu.default", "aten.tanh.default"


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operators_of(model, inputs, gradients=False):
    with Operators() as operators, torch.set_grad_enabled(gradients):
        output = model(**inputs)
    return output.last_hidden_state, operators.counts
