"""A run on a tiny model in one of several processes, which find each other by the variables that `torchrun` sets."""

import sys
from pathlib import Path

import torch
from torch import distributed

from drafter.data import build_dataset as collect
from tests.support.tiny_run import HELD_OUT, PER_SHARD, training_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    collect.PER_SHARD, collect.HELD_OUT = PER_SHARD, HELD_OUT
    distributed.init_process_group("gloo")
    run = training_run(Path(sys.argv[1]))
    kinds = [type(event).__name__ for event in run.run()]
    assert ("Scored" in kinds) == (distributed.get_rank() == 0)
    weights = torch.cat([t.flatten() for t in run.trainer.network.tensors().values()])
    everyone = [torch.empty_like(weights) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, weights)
    assert all(torch.equal(weights, theirs) for theirs in everyone)
    distributed.destroy_process_group()
