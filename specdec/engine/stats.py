"""Counts of a generation, in the words of the glossary: rounds, drafted, accepted, emitted, and where the time went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

PHASES = ("prefill", "draft", "verify", "other")


class Round(NamedTuple):
    """Hold one round of one text, as `generate(on_round=...)` gets it.

    `sources`: the source of each drafted token; the first `accepted` of them were right. `emitted`: the round's tokens.
    The seconds are the round's share of a pass: of its drafts, of its verification, and of the time since the last
    pass.
    """

    sources: tuple[str, ...]
    accepted: int
    emitted: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float


@dataclass
class GenerationStats:
    """Hold counts of one generation, or of several merged.

    `reused`: how many of the `prompt_tokens` came from the cache of an earlier text. `rounds` excludes the prefill,
    whose logits give the first token without a draft: emitted = prompts + rounds + accepted.
    `accepted_per_position[i]` and `drafted_per_position[i]` count rounds in which the draft's token i was accepted, and
    drafted. `draft_sources[name]` holds [drafted, accepted] of a source. `seconds`: by phase. `timeline` holds (seconds
    since the request began, tokens emitted by then) after the prefill and after every round. `graphs`: how a GPU ran
    passes and drafts, as "pass replayed", "pass eager", "draft captured" (`specdec.kernels.graph_counts`).
    """

    prompts: int = 0
    prompt_tokens: int = 0
    reused: int = 0
    emitted: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    drafted_per_position: list[int] = field(default_factory=list)
    draft_sources: dict[str, list[int]] = field(default_factory=dict)
    draft_lengths: Counter[int] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    timeline: list[tuple[float, int]] = field(default_factory=list)
    cache_bytes: int = 0
    graphs: Counter[str] = field(default_factory=Counter)

    @property
    def mean_acceptance_length(self) -> float:
        """Return the tokens emitted per round, one of them the backbone's own: 1 + accepted / rounds, as in vLLM."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Return accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Return, for each position, the share of all rounds in which the draft's token there was accepted
        (unconditional)."""
        return [count / self.rounds for count in self.accepted_per_position]

    @property
    def total_seconds(self) -> float:
        """Return the seconds of all phases together."""
        return sum(self.seconds.values())

    @property
    def ttft(self) -> float:
        """Return the seconds to the first token (of the first prompt, when merged)."""
        return self.timeline[0][0] if self.timeline else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the tokens after the first, per second after the prefill; 0 when there was only one token."""
        seconds = self.total_seconds - self.seconds["prefill"]
        tokens = self.emitted - self.prompts
        return tokens / seconds if seconds > 0 and tokens > 0 else 0.0

    def count_prompt(self, tokens: int, reused: int) -> None:
        """Count a prompt of so many tokens, of which `reused` were in its cache already."""
        self.prompts += 1
        self.prompt_tokens += tokens
        self.reused += reused

    def count_round(self, done: Round) -> None:
        """Count a round's draft and what was accepted of it; emitted tokens and seconds are counted elsewhere."""
        drafted, accepted = len(done.sources), done.accepted
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        self.draft_lengths[drafted] += 1
        for counts, reached in ((self.drafted_per_position, drafted), (self.accepted_per_position, accepted)):
            counts.extend([0] * (max(drafted, reached) - len(counts)))
            for i in range(reached):
                counts[i] += 1
        for i, source in enumerate(done.sources):
            record = self.draft_sources.setdefault(source, [0, 0])
            record[0] += 1
            record[1] += i < accepted

    def merge(self, other: GenerationStats) -> None:
        """Add the counts and seconds of another generation; the timeline stays the first one's."""
        for name in ("prompts", "prompt_tokens", "reused", "emitted", "rounds", "drafted", "accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in (
            (self.drafted_per_position, other.drafted_per_position),
            (self.accepted_per_position, other.accepted_per_position),
        ):
            mine.extend([0] * (len(theirs) - len(mine)))
            for i, count in enumerate(theirs):
                mine[i] += count
        # Copies: the engine's thread may count on while another one asks.
        for source, (drafted, accepted) in list(other.draft_sources.items()):
            record = self.draft_sources.setdefault(source, [0, 0])
            record[0] += drafted
            record[1] += accepted
        self.draft_lengths.update(dict(other.draft_lengths))
        for phase, seconds in list(other.seconds.items()):
            self.seconds[phase] += seconds
        self.timeline = self.timeline or list(other.timeline)
        self.cache_bytes = max(self.cache_bytes, other.cache_bytes)
        self.graphs.update(dict(other.graphs))

    def to_dict(self) -> dict[str, Any]:
        """Return all counts and derived figures as JSON types."""
        return {
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "reused": self.reused,
            "emitted": self.emitted,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "accepted_per_position": self.accepted_per_position,
            "drafted_per_position": self.drafted_per_position,
            "draft_sources": self.draft_sources,
            "draft_lengths": {str(k): n for k, n in sorted(self.draft_lengths.items())},
            "seconds": self.seconds,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_rate": self.acceptance_rate,
            "ttft": self.ttft,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "cache_bytes": self.cache_bytes,
            "graphs": dict(sorted(self.graphs.items())),
        }
