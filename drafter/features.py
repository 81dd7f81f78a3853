"""What a head learns from: texts with the backbone's own states, as `Features`.

`answered` lets the backbone answer prompts, many texts to a pass, and keeps the states that its passes had anyway;
`read` runs texts that somebody else wrote through it. Either way the labels are the backbone's own choices, which is
what a drafter has to guess. Answers cost a pass per token of each text, reading a fraction of that. What a chat
template puts before every prompt is computed once and goes on from text to text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.network import Keys
from specdec import kernels
from specdec.cache import Conversations, KVCache
from specdec.control import FixedLength
from specdec.decode import Request, decode
from specdec.drafting import NoDraft
from specdec.model.decoder import Decoder
from specdec.sampling import Sampler
from specdec.stats import GenerationStats
from specdec.threads import one_torch_thread
from specdec.verify import Verdict

TOGETHER = 32  # texts in a pass
_ROWS = 64  # of logits at once
_SPARE = 4  # caches that wait for a text which begins as theirs did: one in five prompts has a system message
_MODEST = 512  # positions: the cache of a longer text is let go, or all would come to be as large as the largest


@dataclass(frozen=True)
class Features:
    """One text of n tokens, as the backbone sees it.

    `tokens` [n] int64. `hidden` [n, hidden]: the state after the final norm at each token, which chose the next.
    `best` [n] int64: that choice, the likeliest next token. `keys`: K and V, [kv_heads, n, head_dim] each, by the layer
    of the backbone that stores them. `answer`: where the backbone's own words begin. `aux` [n, hidden]: what left other
    layers of the backbone, by layer.
    """

    tokens: Tensor
    hidden: Tensor
    best: Tensor
    keys: Mapping[int, Keys]
    answer: int
    aux: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def states(self, aux_layers: Sequence[int]) -> tuple[Tensor, ...]:
        """`hidden`, and what left each of `aux_layers`."""
        return self.hidden, *(self.aux[layer] for layer in aux_layers)


def answered(
    backbone: Decoder,
    prompts: Iterable[Tensor],
    *,
    layers: Sequence[int],
    aux_layers: Sequence[int] = (),
    max_new_tokens: int,
    ends: frozenset[int],
    temperatures: Sequence[float] = (0.0,),
    seed: int = 0,
    first: int = 0,
    together: int = TOGETHER,
    dtype: torch.dtype = torch.bfloat16,
    stats: GenerationStats | None = None,
) -> Iterator[tuple[int, Features]]:
    """(number of the prompt, its text) for each of `prompts` ([n] int64), in the order in which they end.

    Prompts are numbered from `first` on. `temperatures` are taken in turn by number, 0 is greedy; a text ends with a
    token of `ends`. States, those that leave `aux_layers` too, and the K/V of `layers` are kept as `dtype`. The last
    token of a text is not among its features: nothing was computed from it. A sliding layer's keys reach back only as
    far as its ring, so texts end where the shortest ring does.
    """
    longest = longest_text(backbone, layers)
    spare = _Spare(backbone, (1 + len(aux_layers)) * backbone.spec.hidden_size)
    watched: dict[int, list[Tensor]] = {}
    likeliest: dict[int, list[int]] = {}  # for each emitted token
    prompted: dict[int, Tensor] = {}  # and for each token of the prompt but the last, as far as it is known
    begins: dict[int, int] = {}

    def requests() -> Iterator[Request]:
        for number, prompt in enumerate(prompts, first):
            temperature = temperatures[number % len(temperatures)]
            prompt = prompt[: longest - 1]
            known = spare.take(prompt)
            watched[number], prompted[number] = [known.hidden], known.best
            likeliest[number], begins[number] = [], len(prompt)
            yield Request(
                prompt,
                min(len(prompt) + max_new_tokens, longest),
                Sampler.warmed(temperature, seed + number),
                lambda tokens, choice: choice.token in ends,
                partial(_note, likeliest[number], greedy=not temperature),
                watch=watched[number].append,
            )

    # Without a drafter: these are the plain model's texts either way, and several share a pass.
    for number, row, cache in decode(
        backbone,
        NoDraft(aux_layers),
        FixedLength(0),
        requests(),
        stats or GenerationStats(),
        together,
        spare.handed_out,
    ):
        number += first
        hidden, answer, known = torch.cat(watched.pop(number)), begins.pop(number), prompted.pop(number)
        asked = torch.cat((known, _best(backbone, hidden[len(known) : answer - 1])))  # [answer - 1]
        best = torch.cat((asked, asked.new_tensor(likeliest.pop(number))))  # [n]
        with one_torch_thread():
            states, aux = _parted(hidden.to(dtype), aux_layers)
            text = Features(row[:-1], states, best, kept_keys(cache, layers, dtype), answer, aux)
        spare.keep(_Begun(row[: answer - 1], hidden[: answer - 1].clone(), asked, cache))
        yield number, text


class _Begun(NamedTuple):
    """What is known of the first n tokens of a text: `tokens` [n], `hidden` [n, width] as a pass gives it, `best` [n],
    and the cache that holds them."""

    tokens: Tensor
    hidden: Tensor
    best: Tensor
    cache: KVCache


class _Spare:
    """Caches of texts that have ended, for new ones: no memory to be had anew, and what both texts begin with is there.

    `width`: of a pass's rows. `handed_out` gives `decode` the cache that was last taken.
    """

    def __init__(self, backbone: Decoder, width: int) -> None:
        self._backbone, self._width = backbone, width
        self._kept, self._next = list[_Begun](), list[KVCache]()
        self.handed_out = Conversations(self._next.pop)

    def take(self, prompt: Tensor) -> _Begun:
        """As much of prompt [n] as is known, but never its last token, whose state chooses the first of the answer."""
        if len(self._kept) < _SPARE:
            backbone = self._backbone
            with one_torch_thread():  # many small ones
                cache = backbone.new_cache()
            hidden = torch.empty(0, self._width, dtype=backbone.dtype, device=backbone.device)
            known = _Begun(prompt[:0], hidden, torch.empty(0, dtype=torch.int64, device=backbone.device), cache)
        else:
            shared = [_shared(old, prompt[:-1]) for old in self._kept]
            most = max(shared)
            tokens, hidden, best, cache = self._kept.pop(shared.index(most))
            cache.rewind(most)
            known = _Begun(tokens[:most], hidden[:most], best[:most], cache)
        self._next.append(known.cache)
        return known

    def keep(self, text: _Begun) -> None:
        if text.cache.length <= _MODEST and text.cache.rewindable(0):
            self._kept = [*self._kept[-_SPARE:], text]


def _shared(text: _Begun, prompt: Tensor) -> int:
    """How many tokens `text` and prompt [n] begin with alike."""
    most = min(len(text.tokens), len(prompt))
    differs = (text.tokens[:most] != prompt[:most]).nonzero()
    return int(differs[0]) if len(differs) else most


def read(
    backbone: Decoder,
    texts: Iterable[Tensor],
    layers: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    aux_layers: Sequence[int] = (),
) -> Iterator[Features]:
    """Texts ([n] int64) that the backbone did not write, each cut where the shortest ring of its cache ends."""
    for text in texts:
        text = text[: longest_text(backbone, layers)].to(backbone.device)
        cache, hidden = backbone.new_cache(), []
        for part in torch.split(text, cache.max_rows):
            hidden.append(backbone.forward(part, cache, aux_layers))
            cache.commit(len(part))
        best = _best(backbone, torch.cat(hidden))  # [n]
        states, aux = _parted(torch.cat(hidden).to(dtype), aux_layers)
        yield Features(text, states, best, kept_keys(cache, layers, dtype), len(text), aux)


def _parted(states: Tensor, aux_layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Rows [n, (1 + aux layers) * hidden] of a pass, taken apart: [n, hidden] each."""
    hidden, *aux = (part.contiguous() for part in states.chunk(1 + len(aux_layers), dim=1))
    return hidden, dict(zip(aux_layers, aux, strict=True))


def kept_keys(cache: KVCache, layers: Sequence[int], dtype: torch.dtype) -> dict[int, Keys]:
    """The K and V of `layers`, of all positions of `cache`, which their rings must still hold."""
    keys = {}
    for layer in layers:
        store = cache.stores[layer]
        assert store is not None and cache.length <= store.slots, "the text has outgrown the ring"
        keys[layer] = Keys(*(part.to(dtype, copy=True) for part in kernels.stored(store.view, 0, cache.length)))
    return keys


def _best(backbone: Decoder, hidden: Tensor) -> Tensor:
    """The likeliest next token after each of hidden [n, hidden]: [n] int64."""
    if not len(hidden):
        return torch.empty(0, dtype=torch.int64, device=hidden.device)
    return hidden.new_tensor(
        [i for rows in torch.split(hidden, _ROWS) for i in _likeliest(backbone.logits(rows))], dtype=torch.int64
    )


def _likeliest(logits: Tensor) -> list[int]:
    """Of each row of logits [n, vocab]; torch's argmax takes five times as long."""
    return [kernels.best(row)[1] for row in logits]


def _note(likeliest: list[int], verdict: Verdict, logits: Tensor, *, greedy: bool) -> None:
    """Of every token that was emitted, what would have been by greed; its logits are there, and need not come again."""
    likeliest.extend(verdict.tokens if greedy else _likeliest(logits))


def longest_text(backbone: Decoder, layers: Sequence[int]) -> int:
    """Tokens that a text can have for the shortest ring of `layers` to reach back to its beginning from its end."""
    windows = [backbone.spec.layers[i].window for i in layers]
    return min([backbone.context, *(window for window in windows if window is not None)])
