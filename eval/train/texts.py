"""The texts of `run.py train`: prompts, chats and documents as the token ids of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from drafter.data.given import EncodedPrompt, GivenText
from drafter.data.server import Reply
from drafter.prompts.files import TrainingPrompt
from drafter.prompts.generator import document_passages
from drafter.prompts.texts import Chat, read_chats
from eval.cli.session import Session
from eval.prompts.sets import Message
from specdec.cache.reuse import shared_beginning

Weighted = tuple[float, Iterator[GivenText]]


class Texts:
    """Keep the texts of `sources`, (name, weight), that are read as they are: chats of a `.jsonl` file, and a text file
    or a folder of them, cut into passages."""

    def __init__(self, sources: Sequence[tuple[str, float]], seed: int) -> None:
        """Read the files of chats. Raises ValueError: nothing is at a name, or a line is no chat."""
        self._sources, self._seed = tuple(sources), seed
        self._chats = {name: read_chats(Path(name)) for name, _ in sources if name.endswith(".jsonl")}
        for name, _ in sources:
            if name not in self._chats:
                document_passages(Path(name), seed)
        self._encoded: dict[str, list[GivenText]] = {}

    def __bool__(self) -> bool:
        return bool(self._sources)

    def encode(self, session: Session, longest: int) -> None:
        """Make token ids of all chats, at most `longest` of each. Raises ValueError, with the file and the line, for a
        chat that the model's template refuses."""
        for name, chats in self._chats.items():
            self._encoded[name] = [encode_chat(session, chat, longest) for chat in chats]

    def parts(self, session: Session, longest: int) -> list[Weighted]:
        """Return weight and texts of each source, always the same; `encode` was called before."""

        def document(passage: str) -> GivenText:
            tokens = session.encode([{"role": "user", "content": passage}], raw=True)[0][:longest]
            return GivenText(tokens, min(1, len(tokens)))

        found: list[Weighted] = []
        for name, weight in self._sources:
            if name in self._encoded:
                found.append((weight, iter(self._encoded[name])))
            else:
                found.append((weight, map(document, document_passages(Path(name), self._seed))))
        return [(weight, filter(_learnable, texts)) for weight, texts in found]


def _learnable(text: GivenText) -> bool:
    return len(text.tokens) > 1


def encode_chat(session: Session, chat: Chat, longest: int) -> GivenText:
    """Return `chat` as the model's template writes it, cut behind `longest` tokens. Raises ValueError, with the file
    and the line, when the template refuses the chat."""
    messages: list[Message] = [{"role": role, "content": content} for role, content in chat.messages]
    try:
        whole = session.encode(messages, ended=True)[0]
        asked = session.encode(messages[:-1])[0] if messages[:-1] else whole[:1]
    except ValueError as error:
        raise ValueError(f"{chat.where}: {error}") from error
    tokens = whole[:longest]
    return GivenText(tokens, min(max(1, shared_beginning(asked, whole)), len(tokens)))


def messages_of(prompt: TrainingPrompt) -> list[Message]:
    """Return the messages of `prompt` as chat templates take them."""
    return [{"role": role, "content": content} for role, content in prompt.messages]


def completed(session: Session, prompt: EncodedPrompt, reply: Reply) -> Tensor | None:
    """Return the token ids [n] of `prompt` and the answer to it, as the model's template writes them, up to the
    answer's end token; without it where the limit ended the answer.

    None where the prompt's ids are not the beginning, or the answer's ids are not its text again.
    """
    try:
        whole = session.encode([*messages_of(prompt.prompt), {"role": "assistant", "content": reply.text}], ended=True)[
            0
        ]
    except ValueError:
        return None
    asked, ends = len(prompt.ids), ends_of(session)
    if not torch.equal(whole[:asked], prompt.ids):
        return None
    end = next((i for i in range(asked, len(whole)) if int(whole[i]) in ends), None)
    if end is None:
        return None
    written = session.tokenizer.decode(whole[asked:end].tolist(), skip_special_tokens=False)
    if written.strip() != reply.text.strip():  # templates trim
        return None
    return whole[: end + 1 if reply.ended else end]


def ends_of(session: Session) -> frozenset[int]:
    """Return the tokens that end a text of the model."""
    eos_ids = session.model.generation_config.eos_token_id
    return frozenset(eos_ids if isinstance(eos_ids, list) else [] if eos_ids is None else [eos_ids])
