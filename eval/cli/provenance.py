"""Provenance of a figure: versions, arguments, machine, kernels. Read once, at the end of a command."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eval.cli.session import Session
from specdec import kernels

_PACKAGES = ("specdec-mtp", "torch", "transformers", "tokenizers", "gguf", "safetensors", "numpy", "triton")


def provenance(session: Session) -> dict[str, Any]:
    """Return `versions`, `arguments`, `host` and `model`, in JSON types."""
    model = session.model
    return {
        **machine(model.device),
        "arguments": session.settings.to_dict(),
        "model": {
            "name": session.settings.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "weight_bytes": model.get_memory_footprint(),
            "drafter": model.drafter.name,
        },
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return `versions` and `host`, in JSON types, for commands that have no session."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "host": {
            "cpu": cpu_name(),
            "logical_cpus": os.cpu_count(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,  # over 1, 5 and 15 minutes
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
            "kernels": kernels.active(device),
            "device": _device_name(device),
        },
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return None
