"""240 prompts of one imagined person, who works at a small company that rents bicycles: 24 kinds of request, ten each.

They were written for this project, in `eval/prompts/one_user.jsonl`: a kind's words, and ten contents for them.
"""

from __future__ import annotations

import json
import random
from importlib import resources

from eval.prompts.sets import Prompt

PROMPTS = 240


def one_persons_prompts(seed: int = 0) -> list[Prompt]:
    """Return all prompts, in an order of their own for each `seed`; `Prompt.task` is the kind."""
    lines = resources.files("eval.prompts").joinpath("one_user.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = [json.loads(line) for line in lines]
    found = [
        Prompt(f"{kind['kind']}-{i}", kind["kind"], (kind["template"].replace("{}", content),))
        for kind in kinds
        for i, content in enumerate(kind["contents"])
    ]
    random.Random(seed).shuffle(found)
    return found
