"""The forward pass of `SpecdecForCausalLM`, with the arguments and the output of a transformers model.

The rows are independent texts. Each row has its own cache, which goes on where a caller hands `past_key_values` back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec.hf.settings import refuse_inputs, usual_positions
from specdec.model.decoder import Decoder
from specdec.model.embedder.blocks import media_blocks
from specdec.model.embedder.inputs import MediaInputs
from specdec.model.media import MediaBlocks, chunk_end
from specdec.model.states import States
from specdec.util.threads import turn_to_compute


class ForwardCache:
    """Hold the state that a forward pass leaves for the next pass: `past_key_values` of the output, changed in place.

    `mask` [rows, columns] bool: which columns so far were tokens. `following`: each row's next position.
    """

    def __init__(self, decoder: Decoder, rows: int) -> None:
        self.decoder = decoder
        self.caches = [decoder.new_cache() for _ in range(rows)]
        self.mask = torch.zeros(rows, 0, dtype=torch.bool)
        self.following: list[int | None] = [None] * rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns so far, padding included, as transformers counts."""
        return self.mask.shape[1]


def forward(
    decoder: Decoder,
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: ForwardCache | None = None,
    labels: Tensor | None = None,
    use_cache: bool = True,
    logits_to_keep: int | Tensor = 0,
    output_hidden_states: bool = False,
    num_items_in_batch: int | Tensor | None = None,
    **others: Any,
) -> CausalLMOutputWithPast:
    """Run the decoder over token ids [B, n]; `SpecdecForCausalLM.forward` says what the arguments mean.

    `others`: media, and arguments that are refused.

    Raises:
        ValueError: an argument that cannot be honoured; the message says what to do instead.
    """
    refuse_inputs(others, attention_mask)
    ids = _checked_ids(decoder, input_ids)
    past = _checked_past(decoder, past_key_values, ids.shape[0])
    mask = _new_columns(attention_mask, ids, past)  # [B, n]
    following = _positions(position_ids, mask, past)
    wanted = range(len(decoder.layers) - 1) if output_hidden_states else ()
    media = media_blocks(ids, mask, MediaInputs.of(others), decoder.media)
    states = _states(decoder, ids, mask, past, wanted, media)  # [B, n, hidden] each
    past.mask, past.following = torch.cat((past.mask, mask.cpu()), dim=1), following

    rows, columns = ids.shape
    picks = _picks(logits_to_keep, rows, columns, decoder.device)
    made = picks if labels is None else _picks(0, rows, columns, decoder.device)
    adapters = [cache.adapter for cache in past.caches]
    logits = [_logits(decoder, *row) for row in zip(states.last, mask, made, adapters, strict=True)]
    loss = None
    if labels is not None:
        loss = _loss(torch.stack(logits), labels, num_items_in_batch)
        logits = [row[pick] for row, pick in zip(logits, picks, strict=True)]
    flat = isinstance(logits_to_keep, Tensor) and logits_to_keep.dtype == torch.bool
    return CausalLMOutputWithPast(
        loss=loss,
        logits=torch.cat(logits) if flat else torch.stack(logits),
        past_key_values=past if use_cache else None,
        hidden_states=_per_layer(decoder, ids, mask, states, media, adapters[0]) if output_hidden_states else None,
    )


def _checked_ids(decoder: Decoder, ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ValueError("forward() needs input_ids [batch, n]; prompts that are embeddings are not supported")
    ids = torch.as_tensor(ids, device=decoder.device)
    vocabulary = decoder.spec.vocab_size
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise ValueError(f"input_ids must be token ids [batch, n], at least one; got {ids.dtype} {list(ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"token ids must lie in 0..{vocabulary - 1}; is the tokenizer this model's own?")
    return ids.long()


def _checked_past(decoder: Decoder, past: Any, rows: int) -> ForwardCache:
    if past is None:
        return ForwardCache(decoder, rows)
    if not isinstance(past, ForwardCache) or past.decoder is not decoder:
        raise ValueError(
            f"past_key_values must be what this model's forward() returned before, got a {type(past).__name__}; "
            "leave it out of the first call"
        )
    if len(past.caches) != rows:
        raise ValueError(f"past_key_values is of {len(past.caches)} rows and input_ids of {rows}; pass as many")
    return past


def _new_columns(mask: Tensor | None, ids: Tensor, past: ForwardCache) -> Tensor:
    """Return the part of an attention mask [B, columns so far + n] that belongs to ids [B, n], as bool."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    mask = torch.as_tensor(mask, device=ids.device)
    before = past.mask.shape[1]
    if mask.shape != (ids.shape[0], before + ids.shape[1]):
        raise ValueError(
            f"attention_mask must be [batch, {'columns so far + ' if before else ''}n] = "
            f"{[ids.shape[0], before + ids.shape[1]]}, got {list(mask.shape)}"
        )
    mask = mask.bool()
    if not torch.equal(mask[:, :before].cpu(), past.mask):
        raise ValueError("attention_mask keeps other tokens than it did in the pass that past_key_values comes from")
    return mask[:, before:]


def _positions(positions: Tensor | None, mask: Tensor, past: ForwardCache) -> list[int | None]:
    """Return the position that comes next in each row. Raises ValueError where positions leave a gap."""
    columns = past.mask.shape[1] + torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device)[None]  # [1, n]
    given = columns if positions is None else torch.as_tensor(positions, device=mask.device)
    starts = [-1 if start is None else start for start in past.following]
    going_on = [row for row, start in enumerate(starts) if start >= 0]
    fresh = [row for row, start in enumerate(starts) if start < 0]
    lines = given.expand(mask.shape[0], -1) if given.dim() == 2 and given.shape[0] == 1 else given
    for rows, first in ((fresh, None), (going_on, [starts[row] for row in going_on])):
        if rows and not (lines.shape == mask.shape and usual_positions(lines[rows], mask[rows], first)):
            raise ValueError(
                "positions with a gap are not supported: leave masked tokens out of the middle of a row, or pass "
                "position_ids that count the tokens of each row one by one (attention_mask.cumsum(-1) - 1)"
            )
    return [
        int(line[kept][-1]) + 1 if bool(kept.any()) else before
        for line, kept, before in zip(lines, mask, past.following, strict=True)
    ]


def _states(
    decoder: Decoder, ids: Tensor, mask: Tensor, past: ForwardCache, wanted: Sequence[int], media: Sequence[MediaBlocks]
) -> States:
    """Return last states and outputs of `wanted` layers, [B, n, hidden] each; zeros where `mask` is false.

    `media`: of each row, at positions among the tokens of `ids` that `mask` keeps.
    """
    shape = (*ids.shape, decoder.spec.hidden_size)
    every = [torch.zeros(shape, dtype=decoder.dtype, device=decoder.device) for _ in range(1 + len(wanted))]
    for row, cache in enumerate(past.caches):
        done, kept, begin = [], ids[row, mask[row]], cache.length  # a row of padding alone has nothing to run
        blocks = [block.moved(begin).embedded_once() for block in media[row]]
        while (at := cache.length - begin) < len(kept):
            end = chunk_end(blocks, cache.length, begin + len(kept), cache.max_rows) - begin
            with turn_to_compute():
                done.append(decoder.forward(kept[at:end], cache, wanted, blocks))
            cache.commit(end - at)
        if done:
            found = States.cat(done)
            for whole, part in zip(every, (found.last, *found.aux), strict=True):
                whole[row, mask[row]] = part
    return States(every[0], tuple(every[1:]))


def _picks(keep: int | Tensor, rows: int, columns: int, device: torch.device) -> list[Tensor]:
    """Return the columns of each row whose logits are wanted, as transformers reads `logits_to_keep`."""
    every = torch.arange(columns, dtype=torch.int64, device=device)
    if not isinstance(keep, Tensor):
        return [every[-int(keep) if keep else 0 :]] * rows
    keep = keep.to(device)
    if keep.dim() == 0:
        return _picks(int(keep), rows, columns, device)
    if keep.dim() == 2 and keep.shape[0] == rows:
        return [every[line] for line in keep]
    if keep.dim() != 1:
        raise ValueError(f"logits_to_keep must be a number, or positions [n] or [batch, n]; got {list(keep.shape)}")
    return [every[keep]] * rows


def _logits(decoder: Decoder, states: Tensor, mask: Tensor, pick: Tensor, adapter: str) -> Tensor:
    """Return logits [picked, vocab] float32 of one row's states [n, hidden]; zeros for masked tokens."""
    logits = torch.zeros(len(pick), decoder.spec.vocab_size, dtype=torch.float32, device=decoder.device)
    live = mask[pick]
    if bool(live.any()):
        with turn_to_compute():
            parts = torch.split(states[pick[live]], _AT_ONCE)
            logits[live] = torch.cat([decoder.logits(part, [adapter] * len(part)) for part in parts])
    return logits


_AT_ONCE = 64  # rows whose logits are made in one product


def _loss(logits: Tensor, labels: Tensor, items: int | Tensor | None) -> Tensor:
    """Return the next tokens' cross-entropy, logits [B, n, vocab] and labels [B, n]: its mean, or sum over `items`."""
    following = labels[:, 1:].flatten().to(logits.device)  # [B * (n - 1)]
    ahead = logits[:, :-1].flatten(0, 1)  # [B * (n - 1), vocab]
    if items is None:
        return torch.nn.functional.cross_entropy(ahead, following)
    return torch.nn.functional.cross_entropy(ahead, following, reduction="sum") / items


def _per_layer(
    decoder: Decoder, ids: Tensor, mask: Tensor, states: States, media: Sequence[MediaBlocks], adapter: str
) -> tuple[Tensor, ...]:
    """Return hidden states [B, n, hidden] in transformers' order: embeddings, each layer's output, the normed last."""
    embedded = decoder.embed(ids.flatten(), decoder.adapters.of(adapter))
    embedded = embedded.view(*ids.shape, -1) * mask[..., None]  # [B, n, hidden]
    for row, blocks in enumerate(media):
        columns = mask[row].nonzero().squeeze(1)  # [kept]
        for block in blocks:
            embedded[row, columns[block.start : block.end]] = block.rows().to(embedded)
    return (embedded, *states.aux, states.last)
