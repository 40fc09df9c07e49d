"""The training worker under FSDP2 on the CPU, which accelerate does not enable by itself. For tests alone."""

import os
import sys

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import PartialState
from accelerate.utils import DistributedType

from trl_distill_plugins.cli import worker

PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.exit(worker.run(sys.argv[1:]))
