"""The training worker, which fails unless it was sharded as SHARDING says: without a GPU that is easily lost silently.

accelerate does not enable FSDP2 on the CPU by itself; this does.
"""

import os
import sys

if os.environ["SHARDING"] == "FSDP":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from trl_distill_plugins.cli import worker

if os.environ["SHARDING"] == "FSDP":
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    code = worker.run(sys.argv[1:])
    state = AcceleratorState()
    if (state.distributed_type.value, state.num_processes) != (os.environ["SHARDING"], 2):
        sys.exit(f"not sharded: {state.distributed_type.value} on {state.num_processes} processes")
    worker.exit_with(code)
