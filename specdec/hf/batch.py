"""Run a request that transformers prepared, and return transformers' types.

`SpecdecForCausalLM` is a `PreTrainedModel` with `GenerationMixin`, and its decoding method is the engine. So configs,
processors, stopping criteria and streamers are transformers' own. `speculative` is the same loop as a
`custom_generate`, for a model that transformers loaded. The rows of a batch share their passes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as Several
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.cache import Conversations
from specdec.drafting.calibrate import calibrate
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafter, NoDraft, bind_drafter
from specdec.drafting.registry import draft_spec
from specdec.engine.engine import Engine
from specdec.engine.event import Event
from specdec.engine.sampling import Sampler, Warping
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.hf.in_step import RowsInStep, needs_all_rows
from specdec.hf.options import Options
from specdec.hf.settings import refuse_unsupported
from specdec.memory.plan import picture_bytes, text_bytes
from specdec.model.decoder import Decoder
from specdec.model.embedder.blocks import media_blocks
from specdec.model.embedder.inputs import MediaInputs
from specdec.model.media import MediaBlock
from specdec.util.threads import turn_to_compute

MAX_BATCH = 32  # texts in a pass: more take memory, and on a CPU win no more

Config = Any  # transformers' GenerationConfig, after generate() prepared it


@dataclass(frozen=True)
class Batch:
    """Hold the arguments that transformers' `generate` hands to a decoding method. `input_ids`: [rows, n] int64;
    `media`: the pictures and sound of each row, where there are any."""

    input_ids: Tensor
    attention_mask: Tensor | None
    processors: Any  # transformers' LogitsProcessorList
    criteria: StoppingCriteriaList
    config: Config
    streamer: Any = None
    media: Several[tuple[MediaBlock, ...]] = ()

    @property
    def keeps_scores(self) -> bool:
        """Return whether the scores of every step are wanted: transformers' loop keeps them, and its criteria see
        them."""
        return bool(self.config.output_scores and self.config.return_dict_in_generate)


def run_batch(
    backbone: Decoder,
    drafter: Drafter,
    adaptive: AdaptiveLength,
    batch: Batch,
    options: Options,
    stats: GenerationStats,
    conversations: Conversations | None = None,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode every row of `batch`, and return the output of transformers' `generate`, with the same padding.

    Raises:
        ValueError: an empty or too long prompt, token ids outside the vocabulary, an unsupported option, a constraint
            beside processors that look at all rows at once.
    """
    refuse_unsupported(batch.config)
    backbone.adapters.resolve(options.adapter)  # raises for a name that is none, before anything is computed
    if not options.speculation:
        drafter = NoDraft()
    lengths = options.lengths(adaptive)
    with turn_to_compute(), bind_drafter(drafter, backbone):  # which may refuse it, before anything is computed
        if lengths is adaptive:
            texts = 1 if batch.streamer is not None else min(batch.input_ids.shape[0], MAX_BATCH)
            calibrate(adaptive, backbone, drafter, texts)
    seeds = options.seeds(batch.input_ids.shape[0], bool(batch.config.do_sample))
    rows = [_row(backbone, batch, row) for row in range(len(seeds))]
    requests = [_request(backbone, batch, row, seed, options) for row, seed in zip(rows, seeds, strict=True)]
    in_step = None
    if len(rows) > 1 and needs_all_rows(batch.processors, batch.criteria):
        if options.constraint is not None:
            raise ValueError(
                "a logits processor or stopping criterion of this call looks at all rows at once, and a constraint "
                "follows each row by itself; give one prompt at a time"
            )
        in_step, requests = _in_step(batch, requests)
    most = _max_batch(backbone, drafter, batch, requests, in_step)
    kept = conversations if options.reuse else None
    engine = Engine(backbone, drafter, lengths, kept, most, stats, options.on_round)
    if in_step is not None:
        sequences = engine.add_lockstep(requests, in_step)
    else:
        sequences = [engine.add(request) for request in requests]
    row_of = dict(zip(sequences, rows, strict=True))
    streamed = _Streamed(batch.streamer, len(rows) if in_step is not None else 1)
    try:
        with closing(engine.run_to_end()) as events:  # after Ctrl-C the same prompt goes on from where it was
            for event in events:
                if batch.config.output_logits and event.logits is not None:
                    row_of[event.sequence].logits.extend(event.logits.clone())
                streamed.put(event)
    finally:
        if batch.streamer is not None:
            batch.streamer.end()  # after an error too: a consumer in another thread must not wait for ever
    for sequence, row in row_of.items():
        row.tokens = sequence.row
    return _output(batch, rows, in_step)


def media_of_rows(
    backbone: Decoder, ids: Tensor, mask: Tensor | None, inputs: Mapping[str, Any], copies: int = 1
) -> list[tuple[MediaBlock, ...]]:
    """Return the media of each row of ids [rows, n], from the keyword arguments of a processor among `inputs`.

    `copies`: rows in a row that have one prompt; `inputs` are those of each prompt once. Raises ValueError where media
    and prompts do not fit.
    """
    once = None if mask is None else mask[::copies]
    prompts = media_blocks(ids[::copies], once, MediaInputs.of(inputs), backbone.media)
    return [media for media in prompts for _ in range(copies)]


class _Streamed:
    """Feed a streamer: token by token; for rows in lockstep step by step, once the last row's token was emitted."""

    def __init__(self, streamer: Any, rows: int) -> None:
        self._streamer, self._rows = streamer, rows
        self._step: list[int] = []

    def put(self, event: Event) -> None:
        if self._streamer is None:
            return
        for token in event.tokens:
            self._step.append(token)
            if len(self._step) == self._rows:
                self._streamer.put(torch.tensor(self._step, dtype=torch.int64))  # [rows]
                self._step.clear()


@dataclass
class _Row:
    """Hold a row of a batch: its prompt as it was `given` [n], with its `media`; `tokens` [n] int64, which begin as the
    same prompt with its padding on the left; `scores` and `logits` of each emitted token, [vocab], where they are asked
    for."""

    given: Tensor
    tokens: Tensor
    padding: int
    media: tuple[MediaBlock, ...] = ()
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def _request(backbone: Decoder, batch: Batch, row: _Row, seed: int | None, options: Options) -> Request:
    config, given, padding = batch.config, row.given, row.padding
    limit = min(config.max_length, padding + backbone.context)
    if limit < config.max_length:
        warnings.warn(
            f"max_length {config.max_length - padding} exceeds {_context(backbone)}; the text ends there",
            stacklevel=2,
        )

    eos_ids, longest, others = _criteria(batch.criteria)
    moved = not torch.equal(given, row.tokens)  # tokens that the mask hides stood behind others

    def shown(tokens: Tensor) -> Tensor:
        """Return `tokens` [1, n] as processors see them."""
        return torch.cat((given[None], tokens[:, len(given) :]), dim=1) if moved else tokens

    def stop(tokens: Tensor, choice: Choice) -> bool:
        if batch.keeps_scores:
            row.scores.append(choice.scores)
        # Each criterion gets every token, the last one too, as in transformers' loop.
        scores = tuple(s[None] for s in row.scores) if others and batch.keeps_scores else None
        ended = bool(others) and bool(others(shown(tokens[None]), scores)[0])
        return ended or choice.token in eos_ids or len(tokens) >= longest

    def process(tokens: Tensor, scores: Tensor) -> Tensor:
        processed: Tensor = batch.processors(shown(tokens), scores)
        return processed

    # A LogitsProcessorList without processors is falsy: nothing to call.
    processors = None if not batch.processors else process if moved else batch.processors
    warping = Warping(config.temperature or 1.0, config.top_k or 0, config.top_p or 1.0, config.min_p or 0.0)
    sampler = Sampler(processors, seed, padding, warping)
    media, constraint, adapter = row.media, options.constraint, options.adapter
    return Request(row.tokens, limit, sampler, stop, padding, media=media, constraint=constraint, adapter=adapter)


def _in_step(batch: Batch, requests: Several[Request]) -> tuple[RowsInStep, list[Request]]:
    """Return the chooser of all rows, and their requests with one common limit."""
    pad = getattr(batch.config, "_pad_token_tensor", None)
    in_step = RowsInStep(
        batch.input_ids,
        batch.processors,
        batch.criteria,
        [request.sampler for request in requests],
        0 if pad is None else int(pad),
        batch.keeps_scores,
    )
    limit = min(request.limit for request in requests)
    return in_step, [replace(request, limit=limit) for request in requests]


def _criteria(criteria: StoppingCriteriaList) -> tuple[set[int], float, StoppingCriteriaList]:
    """Return the token ids that end a text, the length that ends it, and all other criteria.

    Every call has the first two criteria. They are taken apart because as tensors they would cost more time per token
    than the norms of the model.
    """
    eos_ids: set[int] = set()
    longest = math.inf
    others = StoppingCriteriaList()
    for one in criteria:
        if type(one) is EosTokenCriteria:
            eos_ids |= set(one.eos_token_id.tolist())
        elif type(one) is MaxLengthCriteria:
            longest = min(longest, one.max_length)
        else:
            others.append(one)
    return eos_ids, longest, others


def _row(backbone: Decoder, batch: Batch, row: int) -> _Row:
    """Return row `row` with its padding on the left."""
    given = ids = batch.input_ids[row]
    if batch.attention_mask is not None:
        keep = batch.attention_mask[row].bool().to(ids.device)
        ids = torch.cat((ids[~keep], ids[keep]))  # as transformers counts positions: masked tokens do not exist
        padding = int((~keep).sum())
    else:
        padding = 0
    prompt = ids[padding:]
    context, vocabulary = backbone.context, backbone.spec.vocab_size
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token, for example the tokenizer's BOS token")
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, which exceeds {_context(backbone)}; shorten it")
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocabulary:
        raise ValueError(f"token ids must lie in 0..{vocabulary - 1}; is the tokenizer this model's own?")
    return _Row(given, ids, padding, batch.media[row] if batch.media else ())


def _context(backbone: Decoder) -> str:
    if backbone.context < backbone.spec.max_positions:
        return f"the {backbone.context} tokens that the memory budget leaves room for"
    return f"the model's context of {backbone.context} tokens"


def _max_batch(
    backbone: Decoder, drafter: Drafter, batch: Batch, requests: Several[Request], in_step: RowsInStep | None
) -> int:
    """Return the number of texts in a pass whose caches stay within the memory budget.

    Raises ValueError when rows that must go in lockstep do not fit.
    """
    if batch.streamer is not None and in_step is None:
        return 1  # a streamer is not told whose token it gets: to it, texts come one after the other
    most = MAX_BATCH if in_step is None else len(requests)
    if backbone.room is None:
        return most
    longest = max(request.limit for request in requests)
    largest = max((block.end - block.start for one in requests for block in one.media if block.whole), default=0)
    each = text_bytes(backbone.spec, longest, backbone.kv_dtype, draft_spec(drafter))
    each += picture_bytes(backbone.spec, largest, backbone.kv_dtype, backbone.dtype)
    fit = max(1, backbone.room.cache // each)
    if in_step is not None and fit < most:
        raise ValueError(
            f"the memory budget has room for {fit} texts of {longest} tokens at a time, and a logits processor or "
            f"stopping criterion of this call looks at all {most} rows at once; give fewer rows, or a larger budget"
        )
    return min(most, fit)


def _output(batch: Batch, rows: list[_Row], in_step: RowsInStep | None) -> Tensor | GenerateDecoderOnlyOutput:
    pad = getattr(batch.config, "_pad_token_tensor", None)
    longest = max(len(row.tokens) for row in rows)
    filler = 0 if pad is None else int(pad)
    sequences = batch.input_ids.new_full((len(rows), longest), filler)
    for i, row in enumerate(rows):
        sequences[i, : len(row.tokens)] = row.tokens
        # Masked prompt tokens come back as they were given, wherever they stood.
        sequences[i, : batch.input_ids.shape[1]] = batch.input_ids[i]
    if not batch.config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=None if not batch.keeps_scores else _scores(rows, in_step),
        logits=_steps([row.logits for row in rows]) if batch.config.output_logits else None,
    )


def _scores(rows: list[_Row], in_step: RowsInStep | None) -> tuple[Tensor, ...]:
    return _steps([row.scores for row in rows]) if in_step is None else tuple(in_step.scores)


def _steps(rows: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Turn [vocab] of each row and step into [rows, vocab] of each step; zeros where a row had already ended."""
    steps = max(len(row) for row in rows)
    empty = torch.zeros_like(next(step for row in rows for step in row))
    return tuple(torch.stack([row[i] if i < len(row) else empty for row in rows]) for i in range(steps))
