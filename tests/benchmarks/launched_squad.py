"""What test_squad_processes.py launches: the command, several times in the same processes, which measure rows too.

    torchrun ... tests/benchmarks/launched_squad.py '[["--model", ...], ...]'

Python takes seconds to start a process with all that is imported here.
"""

import json
import sys

import torch.distributed as dist

from benchmarks.squad import __main__ as squad
from benchmarks.squad import rows
from benchmarks.squad.worker import measure

rows.run_worker = lambda job, folder: measure(job)
# Processes that had left each other could find what they said to meet before: they leave once.
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for arguments in json.loads(sys.argv[1]):
    if status := squad.main(arguments):
        sys.exit(status)
leave()
