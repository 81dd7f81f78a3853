"""Other engines, for `bench --modes`, behind one method: `run(ids, tokens)` -> `EngineTiming`.

What: `Transformers` (its own loading of the same .gguf file, and its `generate`, plain or with its own prompt lookup)
and `LlamaCpp` (through the wheel `xllamacpp`, for measuring only, plain or with its own n-gram speculation). What makes
the work equal: the same file, token ids in and token ids counted, the same number of threads for prompt and answer, the
same sampling settings, no prompt cache, and exactly `tokens` new tokens. To reach this number, every engine is told to
go on past EOS: transformers has no EOS to stop at, which touches no logit, and llama.cpp masks its EOS, which costs a
handful of additions. (A minimum length would have cost transformers a logits processor.)

Where the clock is read: `first` is from the call to the first token, `rest` from the first token to the last, for
`tokens - 1` tokens. For transformers both come from a streamer. llama.cpp's server counts `rest` from its first token
itself (`predicted_ms`; its own tokens per second divide all `tokens` by this time, so they are higher by tokens /
(tokens - 1)), and `first` is the remainder of the call.

Left out: compiled transformers and its static cache, GPU builds, batches. Nothing heavy is imported before an engine is
made: `eval.bench.remote` makes each engine in a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Protocol

INSTALL = "pip install -c constraints.txt -e '.[bench]'"
DTYPES = ("float32", "bfloat16")  # in which transformers is measured
LOOKUP = 10  # tokens that transformers' prompt lookup drafts: what its documentation uses
NEEDS = {"transformers": ("transformers", "accelerate"), "llama.cpp": ("xllamacpp",)}  # packages, by first word


@dataclass(frozen=True)
class EngineTiming:
    """Keep the time of a run: `tokens` emitted, `first`: seconds from the call to the first token, `rest`: from there
    to the last.

    `drafted` and `accepted`: as the engine counts its own speculation.
    """

    tokens: int
    first: float
    rest: float
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Sampling:
    """Keep the sampling settings in full, so that no engine falls back on defaults of its own. `temperature` 0:
    greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    seed: int = 0


class Engine(Protocol):
    """Decode with another engine. `details`: version, build, dtype, in one line."""

    details: str

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        """Decode exactly `tokens` tokens after the prompt `ids`. Raises ValueError when the engine cannot."""


def check_packages(words: Sequence[str]) -> None:
    """Raise a ValueError when a package is missing for one of the engines that `words` name."""
    for word in words:
        for package in NEEDS[word]:
            if util.find_spec(package) is None:
                raise ValueError(f"--modes {word} needs the package {package}: {INSTALL}")


class Transformers:
    """Decode with transformers' own model of a .gguf `file`, expanded to `dtype` ("float32" or "bfloat16").

    `lookup`: tokens that transformers' prompt lookup drafts, 0: none. Raises ValueError (from transformers) for an
    architecture whose GGUF files transformers does not read.
    """

    def __init__(self, file: Path, dtype: str, threads: int, sampling: Sampling, lookup: int = 0) -> None:
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._seed = sampling.seed
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=getattr(torch, dtype), trust_remote_code=False
        )
        attention = self._model.config._attn_implementation
        drafting = f", prompt lookup of {lookup} tokens" if lookup else ""
        self.details = f"transformers {transformers.__version__}, {attention} attention{drafting}"
        self._options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "eos_token_id": None}
        names = ("temperature", "top_p", "top_k")
        # None: a model's own sampling settings would be warned about, for greedy decoding does not use them.
        self._options |= {name: getattr(sampling, name) if sampling.temperature > 0 else None for name in names}
        if lookup:
            self._options["prompt_lookup_num_tokens"] = lookup

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        """Decode `tokens` tokens with `generate`; both times come from a streamer. Raises ValueError where it made
        another number."""
        import torch

        torch.manual_seed(self._seed)
        prompt = torch.tensor([list(ids)], dtype=torch.int64)  # [1, n]
        options = self._options | {"max_new_tokens": tokens, "attention_mask": torch.ones_like(prompt)}
        clock = _Clock()
        began = time.perf_counter()
        self._model.generate(prompt, streamer=clock, **options)
        _check(clock.tokens, tokens)
        return EngineTiming(tokens, clock.first - began, clock.latest - clock.first)


class LlamaCpp:
    """Decode with llama.cpp's server on a .gguf `file`, inside this process; `context`: positions that it makes room
    for.

    `details` has the instruction sets that the wheel was built for: they decide its speed, and a wheel that must run
    everywhere leaves out the newest. `speculation`: one of `NGRAM` in `eval.cli.names`, with llama.cpp's own settings.
    The server keeps a port of its own on the loopback address, which nothing here uses.
    """

    def __init__(self, file: Path, threads: int, context: int, sampling: Sampling, speculation: str = "") -> None:
        import xllamacpp

        build = [part.split("=")[0].strip() for part in xllamacpp.get_system_info().split("|") if part.endswith("= 1 ")]
        version = metadata.version("xllamacpp")
        self.details = f"xllamacpp {version}, built for {' '.join(build).removeprefix('CPU : ')}"
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = context, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_prompt, params.cache_ram_mib = False, 0
        params.n_gpu_layers = 0
        if speculation:
            kind = f"COMMON_SPECULATIVE_TYPE_{speculation.upper().replace('-', '_')}"
            params.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
            self.details += f", {speculation}"
        params.port = 0  # any free one
        params.verbosity = -1
        self._server: Any = xllamacpp.Server(params)
        self._options: dict[str, Any] = {"ignore_eos": True, "cache_prompt": False}
        if sampling.temperature > 0:
            self._options |= {"samplers": ["temperature", "top_k", "top_p"], "temperature": sampling.temperature}
            self._options |= {"top_k": sampling.top_k, "top_p": sampling.top_p, "seed": sampling.seed}
        else:
            self._options |= {"samplers": ["top_k"], "top_k": 1}  # the shortest way to the highest logit

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        """Decode `tokens` tokens with one request to the server, whose own clock has the time after the first token.

        Raises ValueError when the server refuses the request, decodes another number of tokens, or reads only a part of
        the prompt.
        """
        request = self._options | {"prompt": list(ids), "n_predict": tokens}
        began = time.perf_counter()
        answer = self._server.handle_completions(request)
        seconds = time.perf_counter() - began
        if "error" in answer:
            raise ValueError(f"refused the request: {answer['error'].get('message', answer['error'])}")
        timings, usage = answer["timings"], answer["usage"]
        _check(usage["completion_tokens"], tokens)
        if timings["prompt_n"] != len(ids):
            raise ValueError(f"read {timings['prompt_n']} prompt tokens where it was given {len(ids)}")
        rest = timings["predicted_ms"] / 1000
        return EngineTiming(tokens, seconds - rest, rest, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


class _Clock:
    """Note when the first token comes, and when the latest: a streamer."""

    def __init__(self) -> None:
        self.tokens, self.first, self.latest = 0, 0.0, 0.0
        self._prompt = True

    def put(self, value: Any) -> None:
        if self._prompt:  # generate() hands over the prompt first
            self._prompt = False
            return
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        self.tokens += value.numel()

    def end(self) -> None:
        pass


def _check(emitted: int, tokens: int) -> None:
    if emitted != tokens:  # a speed per token would be of other work
        raise ValueError(f"decoded {emitted} tokens where it was asked for {tokens}; its context may be too small")
