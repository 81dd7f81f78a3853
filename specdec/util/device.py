"""The device that a model runs on: its name, and whether it is here."""

from __future__ import annotations

import torch

from specdec.util.text import did_you_mean

KINDS = ("cpu", "cuda", "mps")
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps"}


def named_device(name: torch.device | str | int) -> torch.device:
    """Return the device that `name` names, of one of KINDS, here or not; a number is that of a CUDA device.

    Raises ValueError for another name.
    """
    name = f"cuda:{name:d}" if isinstance(name, int) else name
    try:
        found = torch.device(name)
    except RuntimeError:  # not a name that torch knows
        found = torch.device("meta")
    if found.type in KINDS and str(found) == str(name):  # torch makes other numbers of those past 127
        return found
    word = str(name).casefold().partition(":")[0]
    meant = did_you_mean(_MEANT.get(word, word), KINDS)
    raise ValueError(f"device {str(name)!r} is no name of one; write cpu, cuda, cuda:1 (the second) or mps.{meant}")


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device that `device` names; for None CUDA where there is one, else the CPU.

    A Mac's GPU has to be asked for: torch would expand the blocks of every weight in every pass there, and would give a
    row other bits with other rows beside it. Raises ValueError for a device that is not here.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if cuda else "cpu")
    found = named_device(device)
    counts = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (found.index or 0) < counts.get(found.type, 0):
        return found
    here = ["cuda" if cuda == 1 else f"cuda:0 to cuda:{cuda - 1}"] if cuda else []
    here += [name for name in ("mps", "cpu") if counts[name]]
    why = _why_no_cuda() if found.type == "cuda" and not cuda else ""
    raise ValueError(f"device {str(found)!r}: there is no such device here; choose {' or '.join(here)}{why}")


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return " (this torch was built without CUDA: pytorch.org, 'Get started', has builds with it)"
    return " (torch finds no GPU of NVIDIA's: does nvidia-smi list one?)"
