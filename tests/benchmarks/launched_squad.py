"""What test_squad_processes.py launches: the command, several times in the same processes, which measure rows too.

    torchrun ... tests/benchmarks/launched_squad.py '[["--model", ...], ...]'

Python takes seconds to start a process with all that is imported here.
"""

import json
import sys

from accelerate import PartialState

from benchmarks.squad import __main__ as squad
from benchmarks.squad import rows
from benchmarks.squad.worker import measure

rows.run_worker = lambda job, folder: measure(job)
for arguments in json.loads(sys.argv[1]):
    if status := squad.main(arguments):
        sys.exit(status)
    PartialState._reset_state()  # as a new process would find it
