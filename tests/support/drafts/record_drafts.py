"""`python -m tests.support.drafts.record_drafts`: writes `drafts.json`, how much of a draft is right in real texts.

The texts are decoded plainly. After every one of their tokens each source of the model's own drafter drafts `LONGEST`
tokens, and what it drafted is compared with the text. A replay of any draft length goes from there without a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import specdec
from eval.prompts.sets import suite_prompts
from specdec.cache import KVCache
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.protocol import Draft, Proposer
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States

MODEL, LONGEST, TOKENS = "smollm2-135m-instruct", 8, 192
PROMPTS = ("code-editing-01", "JSON-02", "chat-01", "mathematical-reasoning-01", "summarisation-01", "translation-02")
FILE = Path(__file__).with_name("drafts.json")


class Listener:
    """A drafter that notes what the sources of `joined` would draft, and drafts nothing."""

    name, max_draft = "listener", LONGEST

    def __init__(self, joined: CompositeDrafter) -> None:
        self.joined = joined
        self.proposers: dict[str, Proposer] = {}
        self.drafts: list[tuple[int, dict[str, Draft]]] = []

    @property
    def aux_layers(self) -> tuple[int, ...]:
        return self.joined.aux_layers

    def bind(self, backbone: Decoder) -> None:
        self.joined.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> Listener:
        able = self.joined.start(cache, noise)
        self.proposers = {one.name: one for one in (able.other, able.suffix, able.short)}
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        drafts = {name: one.propose(tokens, states, LONGEST) for name, one in self.proposers.items()}
        self.drafts.append((len(tokens), drafts))
        return Draft()


def right(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens of `draft` are those of `text`, up to the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(draft, text, strict=False)) if a != b), min(len(draft), len(text)))


def main() -> None:
    model, tokenizer = specdec.load(MODEL), specdec.load_tokenizer(MODEL)
    assert isinstance(model.drafter, CompositeDrafter)
    record = {}
    for prompt in suite_prompts():
        if prompt.name not in PROMPTS:
            continue
        messages = [{"role": "user", "content": prompt.turns[0]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        listener = Listener(model.drafter)
        text = model.generate(
            ids["input_ids"], max_new_tokens=TOKENS + LONGEST, do_sample=False, drafter=listener, draft_length=LONGEST
        )[0].tolist()
        # By source, for each token of the text: tokens drafted, how many of them were right, and the chances of all in
        # percent, two digits each.
        made = [(at, drafts) for at, drafts in listener.drafts if at < len(text) - 1]
        texts = {
            name: [
                "".join(str(len(drafts[name].tokens)) for _, drafts in made),
                "".join(str(right(drafts[name].tokens, text[at:])) for at, drafts in made),
                "".join(f"{min(99, int(100 * chance)):02}" for _, drafts in made for chance in drafts[name].chances),
            ]
            for name in listener.proposers
        }
        record[prompt.name] = texts
        print(prompt.name, len(text) - ids["input_ids"].shape[1], {k: v[1][:40] for k, v in texts.items()})
    FILE.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
