"""Names of the Hugging Face hub: OWNER/NAME, OWNER/NAME:TAG and OWNER/NAME/FILE.gguf."""

from __future__ import annotations

import re
from typing import NamedTuple

_HUB_NAME = re.compile(
    r"(?:hf\.co/|https://huggingface\.co/)?"
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?::(?P<tag>[A-Za-z0-9][\w.-]*)|/(?:(?:resolve|blob)/main/)?(?P<file>[A-Za-z0-9][\w./-]*\.gguf))?"
)


class HubName(NamedTuple):
    """Describe a repository of the hub, and which of its files: one that is named, or the one of a type (Q4_K_M)."""

    repository: str
    tag: str | None = None
    file: str | None = None

    @classmethod
    def of(cls, name: str) -> HubName | None:
        """Return what `name` means on the hub; None where it reads like something else."""
        found = _HUB_NAME.fullmatch(name)
        if found is None or found["repository"].endswith(".gguf") or ".." in name:
            return None
        return cls(found["repository"], found["tag"], found["file"])

    @property
    def whole(self) -> bool:
        """Tell whether the name is that of a repository, without a word about its files."""
        return self.tag is None and self.file is None
