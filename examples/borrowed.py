"""Draft for a model that transformers loaded: it keeps its weights, and `custom_generate` lends it the loop.

python examples/borrowed.py "Name three rivers."

To read a .gguf file, as the default model is, transformers needs accelerate: pip install accelerate
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM

import specdec


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer one prompt with a model that transformers loaded.")
    parser.add_argument("prompt", nargs="?", default="Name three rivers.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    arguments = parser.parse_args()

    path = specdec.model_path(arguments.model)  # transformers wants a folder, and the name of a .gguf file in it
    where = {"gguf_file": path.name} if path.is_file() else {}
    model = AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where)
    tokenizer = specdec.load_tokenizer(arguments.model)

    chat = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **inputs, max_new_tokens=arguments.max_new_tokens, custom_generate=specdec.speculative, drafter="suffix"
    )
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    stats = model.last_stats
    print(f"\n{stats.emitted} tokens in {stats.rounds} rounds after the prompt")


if __name__ == "__main__":
    main()
