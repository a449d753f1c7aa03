"""Attention over global masks: collect a model's average attention, keep what matters, run kernels that skip the rest.

averages = collect_averages(model, batches)
mask = GlobalMask.from_averages(averages, sparsity=0.9)
patch_bert(model, mask, bits=3)
"""

from .attention import sparse_attention
from .averages import AttentionAverages
from .calibration import ProbabilityHistogram, calibrated_table, renormalised_table
from .distillation import distil, text_windows
from .finetuning import finetune_question_answering
from .integrations.collection import collect_averages
from .integrations.probabilities import collect_probabilities
from .integrations.transformers import is_patched, patch_bert, patch_model, patched, unpatch
from .layout import SparseLayout
from .masks import GlobalMask
from .published import load_published_averages
from .quantization import QuantizationTable, load_tables, log_table, quantize, save_tables
from .version import __version__

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
