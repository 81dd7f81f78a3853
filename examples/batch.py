"""Answer several prompts at once: one padded batch, whose rows share their passes, each with the text it has alone.

python examples/batch.py "Name three rivers." "Name two lakes." "What is a delta?"
"""

from __future__ import annotations

import argparse

import specdec

PROMPTS = ["Name three rivers.", "Name two lakes.", "Explain in one sentence what a delta is."]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer several prompts at once.")
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    arguments = parser.parse_args()

    model = specdec.load(arguments.model)
    tokenizer = specdec.load_tokenizer(arguments.model)  # pads on the left, as decoding needs it

    chats = [[{"role": "user", "content": prompt}] for prompt in arguments.prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    # draft_length=4, say, drafts for every row; the default drafts when only one row is left.
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for prompt, answer in zip(arguments.prompts, answers, strict=True):
        print(f"> {prompt}\n{answer}\n")


if __name__ == "__main__":
    main()
