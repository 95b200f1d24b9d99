"""Runs a program with FSDP 2 on CPUs: `accelerate launch ... tests/sharded.py PROGRAM ARGUMENTS`.

accelerate (1.15) shards nothing on CPUs, whatever its config says: it trains data-parallel instead, without a word.
Told that these are GPUs it shards over gloo, as it would over NCCL. The program fails unless all parameters are in
shards.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import Trainer

begin, save = PartialState.__init__, Trainer.save_model


def begin_as_on_gpus(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def save_what_is_sharded(self, *args, **kwargs):
    whole = [name for name, parameter in self.model.named_parameters() if not isinstance(parameter, DTensor)]
    assert self.is_fsdp_enabled and not whole, f"not sharded: {whole[:5]}"
    return save(self, *args, **kwargs)


PartialState.__init__, Trainer.save_model = begin_as_on_gpus, save_what_is_sharded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
