"""Keys of measured rows: hashes of everything that decides about a row, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparse_attn import GlobalMask, extension, kernels
from sparse_attn.distributed import rank_and_world
from sparse_attn.squad.reading import Question

from ..device import ROOT, describe_device, versions
from .setting import Setting
from .worker import Job


class Keys:
    """Makes the keys of one run's rows. `inputs` is the file that all its workers read."""

    def __init__(self, setting: Setting, inputs: Path):
        self._checkpoints: dict[str, str] = {}
        self._revision = setting.revision
        self._shared = {
            "device": describe_device(setting.device),
            "code": _code_digest(),
            "extension": extension.reason(),
            "versions": versions(),
            "inputs": hashlib.sha256(inputs.read_bytes()).hexdigest(),
            "processes": rank_and_world()[1],
            "questions": _questions_digest(setting.questions),
        }

    def of(self, job: Job, mask: GlobalMask | None, names: dict[str, Any]) -> str:
        """The key of a row that `job` measures with `mask` and shows under `names`."""
        content = {
            "job": asdict(replace(job, label="", checkpoint="", mask=None, inputs="")),
            "checkpoint": self._checkpoint(job.checkpoint),
            "mask": None if mask is None else hashlib.sha256(mask.keep.numpy().data).hexdigest(),
            "names": names,
            **self._shared,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _checkpoint(self, name: str) -> str:
        if name not in self._checkpoints:
            folder = Path(name)
            self._checkpoints[name] = _files_digest(folder.iterdir()) if folder.is_dir() else f"{name} {self._revision}"
        return self._checkpoints[name]


def _code_digest() -> str:
    """Of the package with its extension, the kernels with their tables, and the benchmarks."""
    own, triton = Path(extension.__file__).parent, Path(kernels.__path__[0])
    places = ((own, ("*.py", "_C*")), (triton, ("*.py", "*.json")), (ROOT / "benchmarks", ("*.py",)))
    return _files_digest(path for folder, patterns in places for pattern in patterns for path in folder.rglob(pattern))


def _files_digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _questions_digest(questions: list[Question]) -> str:
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()
