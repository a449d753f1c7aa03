"""Attention over global masks: collect a model's average attention, keep what matters, run kernels that skip the rest.

averages = collect_averages(model, batches)
mask = GlobalMask.from_averages(averages, sparsity=0.9)
patch_bert(model, mask, bits=3)
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .attention import sparse_attention
from .averages import AttentionAverages
from .calibration import ProbabilityHistogram, calibrated_table, renormalised_table
from .layout import SparseLayout
from .masks import GlobalMask
from .published import load_published_averages
from .quantization import QuantizationTable, load_tables, log_table, quantize, save_tables
from .version import __version__

if TYPE_CHECKING:
    from .distillation import distil, text_windows
    from .finetuning import finetune_question_answering
    from .integrations.collection import collect_averages
    from .integrations.probabilities import collect_probabilities
    from .integrations.transformers import is_patched, patch_bert, patch_model, patched, unpatch

__all__ = [
    "AttentionAverages",
    "GlobalMask",
    "ProbabilityHistogram",
    "QuantizationTable",
    "SparseLayout",
    "__version__",
    "calibrated_table",
    "collect_averages",
    "collect_probabilities",
    "distil",
    "finetune_question_answering",
    "is_patched",
    "load_published_averages",
    "load_tables",
    "log_table",
    "patch_bert",
    "patch_model",
    "patched",
    "quantize",
    "renormalised_table",
    "save_tables",
    "sparse_attention",
    "text_windows",
    "unpatch",
]

# What imports transformers, which takes seconds, is imported when it is asked for.
_IMPORTED_LATE = {
    "distillation": ("distil", "text_windows"),
    "finetuning": ("finetune_question_answering",),
    "integrations.collection": ("collect_averages",),
    "integrations.probabilities": ("collect_probabilities",),
    "integrations.transformers": ("is_patched", "patch_bert", "patch_model", "patched", "unpatch"),
}


def __getattr__(name: str) -> object:
    for module, names in _IMPORTED_LATE.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f".{module}", __name__), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
