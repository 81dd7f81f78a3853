"""Generate text: `specdec.load` gives a model whose `generate` is transformers' own, and tells what drafting did.

python examples/generate.py "Name three rivers." --max-new-tokens 64
"""

from __future__ import annotations

import argparse

import specdec


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer one prompt, and show what drafting did.")
    parser.add_argument("prompt", nargs="?", default="Name three rivers.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    arguments = parser.parse_args()

    model = specdec.load(arguments.model)
    tokenizer = specdec.load_tokenizer(arguments.model)

    chat = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens)  # speculation=False: the same text
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))

    stats = model.last_stats
    print(f"\n{stats.emitted} tokens in {stats.total_seconds:.1f} s, {stats.mean_acceptance_length:.2f} a round")
    print(f"{stats.accepted} of {stats.drafted} drafted tokens were what the model would have chosen")


if __name__ == "__main__":
    main()
