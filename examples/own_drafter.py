"""Write a drafter: this one drafts from former answers, which the answer to a prompt that was edited often repeats.

python examples/own_drafter.py "List the months." "List the months, and no other words."

The model checks every draft: a bad one costs time, and never changes a word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import specdec

MATCH = 3  # tokens of a text's ending that were seen before, for a draft to be made


class FormerAnswers:
    name, max_draft = "former-answers", 16  # in statistics; tokens of a draft at most
    aux_layers: tuple[int, ...] = ()  # the model's layers whose outputs `propose` gets besides the last state

    def __init__(self) -> None:
        self.following: dict[tuple[int, ...], Sequence[int]] = {}

    def learn(self, tokens: Sequence[int]) -> None:
        for end in range(MATCH, len(tokens)):
            self.following[tuple(tokens[end - MATCH : end])] = tokens[end : end + self.max_draft]

    def bind(self, backbone: specdec.Decoder) -> None:
        """Called before texts of a model: ValueError, here, refuses one that the drafter was not made for."""

    def start(self, cache: specdec.KVCache, noise: specdec.Noise | None = None) -> specdec.Proposer:
        return self  # called for every text; what proposes for it may be the drafter, if it keeps nothing of the text

    def propose(self, tokens: Sequence[int], states: specdec.States, k: int) -> specdec.Draft:
        return specdec.Draft.by(self.name, self.following.get(tuple(tokens[-MATCH:]), ())[:k])


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts one by one, drafting from the answers before.")
    parser.add_argument("prompts", nargs="*", default=["List the months.", "Please list the months."])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    arguments = parser.parse_args()
    drafter = FormerAnswers()
    model, tokenizer = specdec.load(arguments.model, drafter=drafter), specdec.load_tokenizer(arguments.model)
    for prompt in arguments.prompts:
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens)
        answer = output[0, inputs["input_ids"].shape[1] :]
        drafter.learn(output[0].tolist())
        print(f"> {prompt}\n{tokenizer.decode(answer, skip_special_tokens=True)}")
        print(f"({model.last_stats.mean_acceptance_length:.2f} tokens a round)\n")


if __name__ == "__main__":
    main()
