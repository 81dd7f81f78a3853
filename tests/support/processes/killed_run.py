"""A run on a tiny model that tells its events and saves all the time: `test_schedule.py` starts and kills it."""

import sys
from pathlib import Path

import torch

from drafter.data import build_dataset as collect
from drafter.data.patience import Intervals
from tests.support.tiny_run import HELD_OUT, PER_SHARD, training_run

if __name__ == "__main__":
    torch.set_num_threads(1)
    collect.PER_SHARD, collect.HELD_OUT = PER_SHARD, HELD_OUT
    for event in training_run(Path(sys.argv[1]), intervals=Intervals(0.0, 0.0, 0.0)).run():
        number = getattr(event, "step", getattr(event, "texts", 0))
        print(type(event).__name__, number, flush=True)
        if len(sys.argv) > 2 and sys.argv[2:] == [type(event).__name__, str(number)]:
            sys.stdin.read()  # until the kill
