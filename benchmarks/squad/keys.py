"""Keys of measured rows: hashes of everything that decides about a row, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparse_attn import GlobalMask
from sparse_attn.distributed import rank_and_world
from sparse_attn.squad.reading import Question

from ..device import code_version, describe_device, versions
from .setting import Setting
from .worker import Job


class Keys:
    """Makes the keys of one run's rows. `inputs` is the file that all its workers read."""

    def __init__(self, setting: Setting, inputs: Path):
        self._checkpoints: dict[str, str] = {}
        self._revision = setting.revision
        self._shared = {
            "device": describe_device(setting.device),
            "code": code_version(),
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
            self._checkpoints[name] = _folder_digest(Path(name)) if Path(name).is_dir() else f"{name} {self._revision}"
        return self._checkpoints[name]


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def _questions_digest(questions: list[Question]) -> str:
    return hashlib.sha256(json.dumps([asdict(question) for question in questions]).encode()).hexdigest()
