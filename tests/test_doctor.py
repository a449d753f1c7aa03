"""The report on an installation."""

import pytest
import torch

from sparse_attn import doctor, extension
from sparse_attn.attention import backends_on
from sparse_attn.backends import native_cuda, triton
from sparse_attn.kernels.configuration import TuningTable


def report(capsys) -> str:
    doctor.main([])
    return capsys.readouterr().out


@pytest.mark.skipif(not extension.available(), reason="the C++ extension is not built")
def test_names_what_computes(capsys):
    text = report(capsys)
    assert "ok       C++ extension: kernels for" in text
    assert "ok       backend on cpu: native computes attention" in text
    assert f"torch {torch.__version__}" in text


def test_names_what_is_missing_and_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(extension, "reason", lambda: "it was not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU 1")
    monkeypatch.setattr(doctor, "table_of", lambda device: None)
    monkeypatch.setattr(triton, "TRITON_INSTALLED", False)
    monkeypatch.setattr(doctor, "backends_on", lambda device: {"triton": ["Triton is not installed"], "torch": []})
    text = report(capsys)
    assert "missing  C++ extension: it was not built\n         to change that: install a C++ compiler" in text
    assert "missing  Triton: not installed" in text and "pip install triton" in text
    assert "missing  GPU: Some GPU 1" in text and "some-gpu-1.json" in text
    assert "torch computes attention, triton cannot (Triton is not installed)" in text


def test_a_gpu_with_the_table_of_another_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU 1")
    monkeypatch.setattr(doctor, "table_of", lambda device: TuningTable("Some GPU 0", ()))
    finding = doctor._tuning(torch.device("cuda", 0))
    assert finding.ok and finding.text == "Some GPU 1, kernels tuned for Some GPU 0, which has the same architecture"


@pytest.mark.skipif(not extension.available(), reason="the C++ extension is not built")
def test_an_extension_without_the_kernel_for_gpus_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native_cuda, "built", lambda: False)
    assert "missing  CUDA kernels: not built: there was no nvcc, it was newer than torch's CUDA" in report(capsys)
    monkeypatch.setattr(native_cuda, "built", lambda: True)
    assert "ok       CUDA kernels: built into the extension" in report(capsys)


def test_names_what_computes_linear_layers(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "onednn_dtypes", lambda: [torch.float32, torch.bfloat16])
    monkeypatch.setattr(doctor, "multiplied_as", lambda dtype: dtype)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert "ok       linear layers on cpu: oneDNN computes float32 and bfloat16\n" in report(capsys)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "ok       linear layers on cpu: torch's own, faster than oneDNN without AVX-512\n" in report(capsys)
    monkeypatch.setattr(doctor, "multiplied_as", lambda dtype: torch.float32)
    assert "without AVX-512; bfloat16 and float16 by oneDNN as float32, which is faster" in report(capsys)
    monkeypatch.setattr(doctor, "onednn_dtypes", list)
    assert "missing  linear layers on cpu: torch's own" in report(capsys)


def test_backends_and_their_reasons():
    assert backends_on("cpu")["reference"] == []
    assert list(backends_on("cpu"))[:2] == ["native", "torch"]
    assert any("float64" in reason for reason in backends_on("cpu", torch.float64)["torch"])
