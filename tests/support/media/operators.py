"""torchvision beside a torch for the CPU.

transformers' processors of pictures need torchvision. Its package registers operators of a library for GPUs, and cannot
be imported where torch comes without one: every import of transformers then fails. So it is no dependency of the tests.
Install it into a folder of its own, and let pytest load this module before all else; it makes up for the operators:

    pip install --no-deps --target FOLDER torchvision==0.28.0
    PYTHONPATH=FOLDER pytest -n 0 -p tests.support.media.operators tests/media/test_transformers.py
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch

_OPERATORS = ("nms", "qnms")
_LIBRARY: list[torch.library.Library] = []  # an operator lives as long as its library


def _import_torchvision() -> bool:
    if find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _LIBRARY.append(torch.library.Library("torchvision", "DEF"))
        for name in _OPERATORS:
            _LIBRARY[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return bool(torchvision.__version__)


HAS_TORCHVISION = _import_torchvision()
