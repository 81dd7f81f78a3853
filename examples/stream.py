"""Stream an answer: transformers' streamers work, here the one that is read in a loop, as a server or a window would.

python examples/stream.py "Explain recursion in two sentences."
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from transformers import TextIteratorStreamer

import specdec


def main() -> None:
    parser = argparse.ArgumentParser(description="Show an answer while it is made.")
    parser.add_argument("prompt", nargs="?", default="Explain recursion in two sentences.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a .gguf file or a folder")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    arguments = parser.parse_args()

    model = specdec.load(arguments.model)
    tokenizer = specdec.load_tokenizer(arguments.model)

    chat = [{"role": "user", "content": arguments.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        work = pool.submit(model.generate, **inputs, streamer=streamer, max_new_tokens=arguments.max_new_tokens)
        work.add_done_callback(lambda _: streamer.end())  # after an error too, or the loop would wait for ever
        for piece in streamer:
            print(piece, end="", flush=True)
        print()
        work.result()  # raises what went wrong


if __name__ == "__main__":
    main()
