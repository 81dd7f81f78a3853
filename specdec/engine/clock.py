"""Measure where an engine's time goes: prompts, drafts, verification, or none of these; and how a GPU ran its
passes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Several

import torch

from specdec import kernels
from specdec.engine.sequence import Sequence
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Verdict


class PassClock:
    """Assign the time since the last lap to a phase."""

    def __init__(self, stats: GenerationStats, device: torch.device) -> None:
        self.stats, self._device = stats, device
        self._graphs = kernels.graph_counts(device)
        self.began = self.last = time.perf_counter()

    def skip(self) -> None:
        """Assign the time since the last lap to no phase, because there was nothing to do."""
        self.last = time.perf_counter()

    def lap(self, phase: str) -> float:
        """Assign the time since the last lap to `phase`, and return it in seconds."""
        seconds = self._since_last()
        self.stats.seconds[phase] += seconds
        return seconds

    def lap_pass(self, prompts: float) -> float:
        """Assign the time since the last lap to a pass, the share `prompts` of it to prefill; return it in seconds."""
        seconds = self._since_last()
        self.stats.seconds["prefill"] += prompts * seconds
        self.stats.seconds["verify"] += (1 - prompts) * seconds
        return seconds

    def _since_last(self) -> float:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds

    def after_pass(self, verdicts: Mapping[Sequence, Verdict], active: Several[Sequence]) -> None:
        """Note how many tokens have been emitted by now, the most bytes that caches of `active` sequences took, and how
        passes were run on a GPU."""
        graphs = kernels.graph_counts(self._device)
        self.stats.graphs.update(graphs - self._graphs)
        self._graphs = graphs
        if verdicts:
            self.stats.timeline.append((time.perf_counter() - self.began, self.stats.emitted))
        held = sum(sequence.conversation.cache.nbytes for sequence in active)
        self.stats.cache_bytes = max(self.stats.cache_bytes, held)
