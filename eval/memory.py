"""`python -m eval.memory`: the memory that a model takes at a length of context, measured, beside `run.py plan`.

What: for every context and cache type a process of its own loads the model, puts random keys and values in place of all
but the last positions, computes a prompt at the end of them, decodes with drafting and plainly, and reports its peak of
resident memory. Why random keys and values: a pass reads, and memory holds, the same bytes whatever their values, and
computing 16k positions of a 12B model takes a laptop half an hour. With `--computed-frames` the first frames of a video
are such positions too: their pixels are there, as long as any is to be read. Left out: the meaning of the text.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import specdec
from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import machine
from eval.kernels.model_pass import random_tokens
from eval.plan import Asked, plan_memory
from eval.prompts.media import FULL, Part, Picture, Video, media_prompt
from specdec.cache import Conversation
from specdec.hf.batch import media_of_rows
from specdec.memory.plan import Needs, parse_bytes, program_bytes
from specdec.memory.system import file_bytes, peak_bytes
from specdec.model.decoder import Decoder
from specdec.util.terminal import Terminal

TOLERANCE = 0.05  # of the plan: the difference that the measured peak may have


@dataclass(frozen=True)
class Case:
    """Describe one measurement.

    Media, `prefill` and twice `tokens` are the last of its `context` positions; with `from_start` they are the first
    positions of a cache that is as large all the same.
    """

    model: str
    drafter: str
    quantize: Any
    context: int
    kv_dtype: str
    prefill: int
    tokens: int
    draft_length: int
    threads: int | None
    from_start: bool = False
    picture: int = 0
    frames: int = 0
    computed_frames: int = 0  # 0: all of them
    budget: int | None = None  # bytes

    @property
    def media(self) -> list[Part]:
        """Return the media that stand before the last positions: a picture of so many soft tokens, so many frames."""
        picture: list[Part] = [Picture(*FULL[self.picture])] if self.picture else []
        return [*picture, *([Video(self.frames)] if self.frames else [])]


@dataclass(frozen=True)
class Measured:
    """Keep the bytes and seconds of a case. `per_token`: the median of plain decoding; `drafted`: tokens a second.
    `files`: of the resident bytes at the end those that are pages of files, where the system tells."""

    context: int
    kv_dtype: str
    plan: Needs
    peak: int
    ready: float
    prefill_per_second: float
    per_token: float
    drafted: float
    acceptance_length: float
    files: int | None = None

    @property
    def ratio(self) -> float:
        """Return the measured peak over the planned total."""
        return self.peak / self.plan.total

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types, with the plan's parts and the ratio."""
        return {**asdict(self), "plan": self.plan.to_dict(), "ratio": self.ratio}


def measure(case: Case) -> Measured:
    """Measure `case` in this process, which should be a new one. Raises ValueError: see `specdec.load`."""
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    asked = Asked(
        case.model,
        case.drafter,
        case.quantize,
        torch.float32,
        case.context,
        case.budget,
        case.kv_dtype,
        case.picture,
        case.frames,
    )
    plan = plan_memory(asked, program_bytes()).needs(case.context, case.kv_dtype, case.budget)
    began = time.perf_counter()
    options = {"quantize": case.quantize, "kv_dtype": case.kv_dtype, "memory_budget": case.budget}
    model = specdec.load(case.model, case.drafter, device="cpu", **options)
    ready = time.perf_counter() - began
    spec = model.decoder.spec
    media = media_prompt("media", case.media, spec) if case.media else None
    shown = torch.empty(0, dtype=torch.int64) if media is None else media.ids[0]  # [soft tokens and their marks]
    before = case.context - case.prefill - len(shown) - 2 * case.tokens
    if before < 0:
        raise ValueError(f"--context {case.context} must hold media, --prefill and twice --tokens: {-before} more")
    text = torch.cat((random_tokens(model.decoder, before), shown, random_tokens(model.decoder, case.prefill)))
    inputs = {} if media is None else media.inputs
    (blocks,) = media_of_rows(model.decoder, text[None], None, inputs)
    if 0 < case.computed_frames < len(blocks):
        before = blocks[-case.computed_frames].start
    began_with = fill_conversation(model.decoder, text[:before].clone())
    began_with.media = tuple(block.place for block in blocks if block.end <= before)
    if case.from_start and before:
        before = 1
        began_with.cache.restore(before, before)
        began_with.tokens = began_with.tokens[:before].clone()
    model.conversations.limit = began_with.nbytes  # the filled conversation stays, and no other is kept
    if before:
        model.conversations.add(began_with)
    ids = torch.cat((began_with.tokens, text[-len(shown) - case.prefill :]))[None] if case.from_start else text[None]
    computed = ids.shape[1] - before

    def run(**options: Any) -> tuple[torch.Tensor, list[float]]:
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.tokens,
            do_sample=False,
            eos_token_id=None,
            **inputs,
            **options,
        )
        return text, [seconds for seconds, _ in model.last_stats.timeline]

    ids, times = run(draft_length=case.draft_length)
    stats = model.last_stats
    assert stats.reused == before
    _, plain = run(speculation=False)
    return Measured(
        case.context,
        case.kv_dtype,
        plan,
        peak_bytes(),
        ready,
        computed / times[0],
        median(after - before for before, after in pairwise(plain)),
        stats.decode_tokens_per_second,
        stats.mean_acceptance_length,
        file_bytes(),
    )


def fill_conversation(decoder: Decoder, tokens: torch.Tensor) -> Conversation:
    """Return a conversation of `tokens` [n] int64, whose keys and values are random and not computed."""
    cache, positions = decoder.new_cache(), len(tokens)
    for store in cache.stores:
        if store is not None:
            store.reserve(positions)
            for part in store.parts:
                if part.dtype is torch.int8:
                    part.random_(-127, 128)
                elif part.dim() == 2:  # [kv_heads, slots], the scales of int8
                    part.fill_(1 / 127)
                else:
                    part.normal_()
    cache.restore(positions, positions)
    return Conversation(cache, tokens=tokens)


def measure_cases(cases: Sequence[Case]) -> Iterator[Measured]:
    """Measure each case in a process of its own: a process may not give back the memory that it has taken."""
    context = multiprocessing.get_context("spawn")
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            yield pool.submit(measure, case).result()


def _show(found: Sequence[Measured], console: Console) -> None:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    columns: dict[str, Callable[[Measured], str]] = {
        "context": lambda m: f"{m.context:,}",
        "cache": lambda m: m.kv_dtype,
        "plan": lambda m: f"{m.plan.total / 1e9:.2f}",
        "peak": lambda m: f"{m.peak / 1e9:.2f}",
        "files": lambda m: "-" if m.files is None else f"{m.files / 1e9:.2f}",
        "ratio": lambda m: f"{m.ratio:.3f}",
        "ready s": lambda m: f"{m.ready:.1f}",
        "prompt/s": lambda m: f"{m.prefill_per_second:.1f}",
        "ms": lambda m: f"{1000 * m.per_token:.0f}",
        "draft/s": lambda m: f"{m.drafted:.2f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(*(cell(each) for cell in columns.values()))
    console.print(table)
    console.print(
        "plan, peak and the pages of files in it at the end in GB; seconds until ready; prompt tokens/s; ms of a "
        "plain token; tokens/s with drafting"
    )


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.memory` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("memory", __doc__)
    parser.add_argument("--context", nargs="+", type=cli.whole_number(8), default=[1024, 4096, 16384], metavar="N")
    parser.add_argument(
        "--prefill",
        type=cli.whole_number(1),
        default=128,
        metavar="N",
        help="positions that are computed (default 128)",
    )
    parser.add_argument(
        "--tokens",
        type=cli.whole_number(2),
        default=16,
        metavar="N",
        help="decoded with drafting, then plainly (default 16)",
    )
    parser.add_argument(
        "--from-start",
        action="store_true",
        help="compute them at the beginning of a cache that is as large as for all of the context, not at its end",
    )
    cli.add_media_size_options(parser)
    parser.add_argument(
        "--computed-frames",
        type=cli.whole_number(1),
        metavar="N",
        help="the last N frames are computed, and keys and values of those before are random (default: all are)",
    )
    parser.add_argument("--draft-length", type=cli.whole_number(1), default=4, metavar="N", help="default 4")
    parser.add_argument("--model", default=cli.DEFAULT_MODEL, metavar="NAME", help="as for run.py")
    parser.add_argument("--drafter", default="auto", metavar="NAME", help="as for run.py")
    parser.add_argument("--quantize", choices=cli.QUANTIZE, help="as for run.py")
    parser.add_argument("--threads", type=cli.threads, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--kv-dtype",
        nargs="+",
        choices=cli.KV_DTYPES,
        default=["bfloat16", "int8"],
        help="default: bfloat16 int8",
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="as for run.py, like 12GB")
    cli.add_json_option(parser, "the figures")
    a = parser.parse_args(argv)
    if a.computed_frames and (a.from_start or a.computed_frames > (a.frames or 0)):
        parser.error("--computed-frames is a part of --frames, without --from-start")
    if min(a.context) < a.prefill + 2 * a.tokens:
        parser.error("--context must hold --prefill and twice --tokens")

    def command() -> int:
        check_writable(a.json)
        fixed = (
            a.prefill,
            a.tokens,
            a.draft_length,
            a.threads,
            a.from_start,
            a.picture,
            a.frames,
            a.computed_frames or 0,
            None if a.memory_budget is None else parse_bytes(a.memory_budget),
        )
        cases = [Case(a.model, a.drafter, a.quantize, n, kept, *fixed) for kept in a.kv_dtype for n in a.context]
        found: list[Measured] = []
        console, interrupted = Terminal(highlight=False), False
        try:
            with console.status("measuring") as status:
                for each in measure_cases(cases):
                    found.append(each)
                    status.update(f"measured {len(found)} of {len(cases)}")
        except KeyboardInterrupt:
            interrupted = True
        _show(found, console)
        record = {
            "command": "memory",
            "interrupted": interrupted,
            "model": a.model,
            "quantize": a.quantize,
            "drafter": a.drafter,
            "picture": a.picture,
            "frames": a.frames,
            "computed_frames": a.computed_frames,
            "measured": [each.to_dict() for each in found],
            **machine(torch.device("cpu")),
        }
        put_record(a.json, record)
        off = [each for each in found if abs(each.ratio - 1) > TOLERANCE]
        return INTERRUPTED if interrupted else DIFFERS if off else 0

    return run_guarded(command, a.json)


if __name__ == "__main__":
    sys.exit(main())
