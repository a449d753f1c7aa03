"""Hardware counters: which calls are counted, and how Nsight Compute's file is read."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import counted_calls, counters
from benchmarks.attention_workloads import WORKLOADS
from benchmarks.report import counter_section
from tests.helpers import CUDA

RANGE = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
KERNEL = "void sparse_attn::<unnamed>::attention_kernel<sparse_attn::{}>(T1::Call)"
COUNTED = f"""==PROF== Connected to process 7 (/usr/bin/python3)
a line of the program
"ID","Kernel Name","{RANGE}","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"lts__t_sectors_srcunit_tex_op_read.sum","lts__t_sectors_srcunit_tex_op_write.sum","l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",\
"l1tex__data_pipe_lsu_wavefronts_mem_shared.sum","lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","launch__registers_per_thread",\
"{STALLED.format("wait")}","{STALLED.format("long_scoreboard")}","{STALLED.format("selected")}",\
"{STALLED.format("long_scoreboard_not_issued")}"
"","","","byte","byte","ns","sector","sector","","","%","%","register/thread","inst","inst","inst","inst"
"0","{KERNEL.format("Forward<(sparse_attn::Element)0, 64>")}",\
"1  ""<default domain>:native, tile, forward:none:none:none:none",\
"56,600,000","18900000","35,100.5","2000000","1000000","30","120","61.5","22.4","168","1.25","4.5","1","9"
"1","forward","","1","(!) n/a","100","1","1","0","0","1","1","64","0","0","1","0"
"""


@pytest.fixture
def counted(tmp_path):
    path = tmp_path / "counted.csv"
    path.write_text(COUNTED)
    return path


def test_counters_are_read_by_name(counted):
    row, bare = map(counters.result_row, counters.read_counters(counted))
    assert (row["call"], row["kernel"]) == ("native, tile, forward", "attention_kernel<Forward>")
    assert row["microseconds"] == pytest.approx(35.1005)
    assert (row["memory_bytes"], row["l2_bytes"], row["registers"]) == (75.5e6, 96e6, 168)
    assert (row["l2_share"], row["matrix_share"]) == pytest.approx((0.615, 0.224))
    assert row["memory_share"] is None, "not counted"
    assert list(row["stalls"].items()) == [("long_scoreboard", 4.5), ("wait", 1.25)]
    assert (bare["call"], bare["kernel"], bare["memory_bytes"]) == (None, "forward", None)


def test_the_table_shows_what_was_counted(counted, tmp_path):
    rows = [counters.result_row(one) for one in counters.read_counters(counted)]
    results = {"device": "Some GPU", "workload": "squad384", "dtype": "float16", "rows": rows}
    folder = tmp_path / "benchmarks" / "results"
    assert "No GPU" in counter_section(folder)
    (folder / "some-gpu").mkdir(parents=True)
    (folder / "some-gpu" / "counters-2026.json").write_text(json.dumps(results))
    section = counter_section(folder)
    cells = "35.1 | 75.5 MB | – | 96.0 MB | 62% | – | 22% | – | 25% | – | 168 | long_scoreboard 4.5, wait 1.2 |"
    assert f"| native, tile, forward | `attention_kernel<Forward>` | {cells}" in section
    assert "Some GPU: squad384, float16:" in section and "some-gpu/counters-2026.json" in section


def test_the_command_runs_the_profiler_and_writes_both_files(tmp_path, counted, monkeypatch, capsys):
    profiler = tmp_path / "ncu"
    profiler.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nwords = sys.argv\n"
        f"assert words[-2:] == ['benchmarks.counted_calls', 'squad384'] and '--nvtx' in words\n"
        f"shutil.copy({str(counted)!r}, words[words.index('--log-file') + 1])\n"
    )
    profiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(counters, "_gpu", lambda: torch.device("cpu"))
    out = tmp_path / "out" / "counters.json"
    assert counters.main(["--json", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["workload"] == "squad384" and len(results["rows"]) == 2 and results["commit"]
    assert out.with_suffix(".csv").read_text() == COUNTED
    assert "native, tile, forward" in capsys.readouterr().out
    profiler.write_text("#!/bin/sh\nexit 3\n")
    assert counters.main(["--json", str(out)]) == 1
    assert "ncu counted nothing (exit status 3): it does not say why" in capsys.readouterr().err
    refusal = "==ERROR== ERR_NVGPUCTRPERM - no permission"
    where = "import sys; path = sys.argv[sys.argv.index('--log-file') + 1]"
    profiler.write_text(
        f"#!{sys.executable}\n{where}\nopen(path, 'w').write('==PROF== a\\n{refusal}\\n')\nsys.exit(1)\n"
    )
    assert counters.main(["--json", str(out)]) == 1
    assert "(exit status 1): ERR_NVGPUCTRPERM - no permission" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [1, 60])
def test_an_interrupted_profiler_gets_time_to_write(tmp_path, monkeypatch, seconds):
    """What it still needs, but not for ever."""
    monkeypatch.setattr(counters, "_LAST_SECONDS", 5.0)
    written = tmp_path / "written"
    tidying = f"import time; time.sleep({seconds}); open({str(written)!r}, 'w').close()"
    waits, wait = [], subprocess.Popen.wait

    def interrupted(process, timeout=None):
        waits.append(timeout)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    status = counters._run_to_its_end([sys.executable, "-c", tidying])
    assert written.exists() == (seconds == 1) and status == (0 if seconds == 1 else -signal.SIGKILL)


def test_kernels_are_named_by_what_they_compute():
    gradients = KERNEL.format("Gradients<sparse_attn::QueryGradientWarp<(sparse_attn::Element)0, 32> >")
    assert counters.kernel_name(gradients) == "attention_kernel<QueryGradient>"
    unnamed = KERNEL.format("Forward<(sparse_attn::Element)1, 32>").replace("<unnamed>", "(anonymous namespace)")
    assert counters.kernel_name(unnamed) == "attention_kernel<Forward>"
    assert counters.kernel_name("void at::native::elementwise_kernel<4, Forwarding>(int)") == "elementwise_kernel"
    assert counters.kernel_name("grad_query_kernel") == "grad_query_kernel"


def test_without_a_gpu_or_the_profiler_there_is_one_line(tmp_path, monkeypatch, capsys):
    if not CUDA:
        assert counters.main(["--json", str(tmp_path / "out.json")]) == 2
        assert "counters: error: no GPU is available" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert counters.main(["--json", str(tmp_path / "out.json")]) == 2
    assert "there is no ncu (Nsight Compute)" in capsys.readouterr().err


def test_kernels_are_counted_on_each_mask_in_both_passes():
    (short,) = (one for one in WORKLOADS if one.name == "short128")
    device = torch.device("cpu")
    calls = dict(counted_calls.named_calls(short.on(device), device, torch.float32))
    masks = ("element", "tile")
    expected = [f"native, {mask}, {passes}" for passes in ("forward", "forward+backward") for mask in masks]
    assert list(calls) == expected
    assert [len(call()) for call in calls.values()] == [1, 1, 4, 4]
