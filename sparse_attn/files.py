"""Files of the package: safetensors with a kind, a format version and metadata. Never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .version import __version__

FORMAT_VERSION = 1
_HEADER = "sparse_attn"


def save_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]
) -> None:
    """Writes `tensors` and JSON-serialisable `metadata` to `path`; a file that is already there stays whole
    until the new one is complete. Raises OSError where it cannot be written, TypeError for other metadata."""
    path = resolved(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; expected the name of a file to write")
    header = {"kind": kind, "format_version": FORMAT_VERSION, "package_version": __version__, **metadata}
    try:
        header = json.dumps(header)
    except TypeError as error:
        raise TypeError(
            f"{path} cannot be written: metadata {metadata!r}: {error}; expected what JSON knows"
        ) from error
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # the user's own, of which safetensors knows nothing
        save_file(contiguous, unfinished, metadata={_HEADER: header})
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):  # a full disk, say
            raise OSError(f"{path} cannot be written: {error}") from error
        raise


def resolved(path: str | os.PathLike) -> Path:
    """The file that a user's path names: "~" is the home folder, and links are followed."""
    return Path(os.path.realpath(Path(path).expanduser()))


def expect_file(path: Path, expected: str) -> None:
    """Raises FileNotFoundError, or IsADirectoryError, where `path` is no file; `expected` says of what kind."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; expected {expected}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected {expected}")


def load_tensors(
    path: str | os.PathLike, kind: str, names: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_tensors` wrote: the tensors called `names` and the metadata.

    Raises FileNotFoundError where there is no file, and ValueError where it is truncated, not of this package, of
    another kind, of a newer format, or without one of the tensors.
    """
    path = Path(path).expanduser()
    expect_file(path, f"a sparse_attn {kind} file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = (file.metadata() or {}).get(_HEADER)
            metadata = json.loads(header) if header else None
            stored = {name: file.get_tensor(name) for name in file.keys()} if metadata else {}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}); it is truncated or of another format. "
            f"Expected a {kind} file written by sparse_attn"
        ) from error
    if not isinstance(metadata, dict) or "kind" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not one of sparse_attn; expected a {kind} file")
    if metadata["kind"] != kind:
        raise ValueError(f"{path}: holds {metadata['kind']}, expected {kind}")
    version = metadata.get("format_version")
    if not isinstance(version, int):
        raise ValueError(f"{path}: damaged {kind} file: its format version is {version!r}, expected a number")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version} (written by sparse_attn {metadata.get('package_version')}) is newer "
            f"than {FORMAT_VERSION}, the newest that sparse_attn {__version__} reads; upgrade sparse_attn"
        )
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"{path}: {kind} file without the tensors {missing}; it has {sorted(stored)}")
    return stored, metadata
