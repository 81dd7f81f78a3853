"""Generations at once on one model: threads, callbacks, interrupts. Every text is the one that it is alone."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft, NoDraft
from specdec.engine.sampling import Noise
from specdec.util.threads import Turns, one_torch_thread
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import save_assistant

REQUESTS, THREADS = 350, 8


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma4_unified"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> specdec.SpecdecForCausalLM:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    drafter = "suffix"
    if request.param == "gemma4_unified":  # the one whose MTP head reads the cache
        drafter = str(tmp_path_factory.mktemp("assistant"))
        save_assistant(Path(drafter), request.param)
    return specdec.load(folder, drafter=drafter, quantize="int8", device="cpu")


def ask(model: specdec.SpecdecForCausalLM, ids: list[int], new: int, **more: Any) -> list[int]:
    given = torch.tensor([ids], dtype=torch.int64)
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    return model.generate(given, attention_mask=torch.ones_like(given), **settings)[0].tolist()


def jobs_of(seed: int, count: int) -> list[tuple[list[int], int, dict[str, Any]]]:
    """Prompts that share beginnings, past the sliding window too, greedy and sampled."""
    dice = random.Random(seed)
    bases = [[dice.randrange(3, VOCAB) for _ in range(dice.randint(20, 3 * WINDOW))] for _ in range(3)]
    jobs = []
    for i in range(count):
        base = dice.choice(bases)
        ids = base[: dice.randint(len(base) // 2, len(base))] + [
            dice.randrange(3, VOCAB) for _ in range(dice.randint(0, 20))
        ]
        sampled = {"do_sample": True, "temperature": 0.8, "top_k": 0, "seed": i} if i % 3 == 0 else {}
        jobs.append((ids, dice.randint(2, 30), sampled))
    return jobs


class Interrupt:
    """A streamer that stops its own text with an error, after so many tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, tokens: Tensor) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("torch_threads", [1, 2], ids=["side by side", "in turn"])
def test_eight_threads_and_shared_beginnings_and_interrupts(
    model: specdec.SpecdecForCausalLM, torch_threads: int
) -> None:
    torch.set_num_threads(torch_threads)
    jobs = jobs_of(1, 40)
    alone = [ask(model, ids, new, **more, speculation=False, reuse=False) for ids, new, more in jobs]
    model.conversations.forget()
    dice = random.Random(2)
    orders = [(dice.randrange(len(jobs)), dice.random()) for _ in range(REQUESTS)]

    def work(order: tuple[int, float]) -> str:
        number, chance = order
        ids, new, more = jobs[number]
        if chance < 0.15:
            try:
                ask(model, ids, new, **more, streamer=Interrupt(1 + new // 2))
            except KeyboardInterrupt:
                return "interrupted"
            return "an interrupt that was lost"
        options: dict[str, Any] = {"drafter": "suffix"} if chance < 0.3 else {"reuse": chance < 0.8}
        text = ask(model, ids, new, **more, **options)
        emitted = model.last_stats.emitted
        if emitted != new or model.last_stats.prompt_tokens != len(ids):
            return f"statistics of another request: {emitted} tokens emitted of {new}"
        return "right" if text == alone[number] else f"WRONG {number}: {text} for {alone[number]}"

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, orders))
    assert set(found) == {"right", "interrupted"}, [each for each in found if each not in ("right", "interrupted")][:3]
    assert not model.conversations._playing, "every conversation was taken back"


def test_a_second_call_from_a_callback(model: specdec.SpecdecForCausalLM) -> None:
    first = prompt(40, seed=1)[0].tolist()
    inner = [[*first[:30], 11, 12, 13], [300 % VOCAB, 7, 9], first]
    plain = ask(model, first, 40, speculation=False, reuse=False)
    plain_inner = [ask(model, ids, 12, speculation=False, reuse=False) for ids in inner]
    model.conversations.forget()
    found: list[list[int]] = []
    rounds = 0

    def heard(done: specdec.Round) -> None:
        nonlocal rounds
        rounds += 1
        if rounds % 4 == 0:
            found.append(ask(model, inner[len(found) % 3], 12))

    assert ask(model, first, 40, on_round=heard) == plain
    assert len(found) >= 2
    assert found == [plain_inner[i % 3] for i in range(len(found))]
    assert model.last_stats.emitted == 40, "the statistics are those of the call that ended last"
    again = ask(model, first, 40)
    assert again == plain


def test_statistics_are_a_threads_own(model: specdec.SpecdecForCausalLM) -> None:
    ids = prompt(12, seed=3)[0].tolist()
    ask(model, ids, 5)
    seen: list[int] = []
    other = threading.Thread(target=lambda: (ask(model, ids, 9), seen.append(model.last_stats.emitted)))
    other.start()
    other.join()
    assert seen == [9]
    assert model.last_stats.emitted == 5
    quiet: list[int] = []
    third = threading.Thread(target=lambda: quiet.append(model.last_stats.emitted))
    third.start()
    third.join()
    assert quiet == [9], "a thread that asked nothing is told of the last call of all"


def test_one_drafter_object_for_two_models_at_once(tmp_path: Path) -> None:
    models = []
    for seed in (0, 1):
        tiny_model("llama", seed).save_pretrained(tmp_path / str(seed))
        models.append(specdec.load(tmp_path / str(seed), drafter=None, device="cpu"))
    shared = specdec.SuffixDrafter()
    jobs = jobs_of(5, 12)
    alone = [[ask(one, ids, new, **more, reuse=False) for ids, new, more in jobs] for one in models]

    def work(number: int) -> bool:
        which, (ids, new, more) = number % 2, jobs[number // 2]
        return ask(models[which], ids, new, **more, drafter=shared) == alone[which][number // 2]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(2 * len(jobs))))


def test_a_drafter_that_generates_with_the_same_model(model: specdec.SpecdecForCausalLM) -> None:
    class Oracle(NoDraft):
        """Asks the model itself: the slowest of all drafters, and always right."""

        name, max_draft = "oracle", 4

        def start(self, cache: KVCache, noise: Noise | None = None) -> Oracle:
            return self

        def propose(self, tokens: list[int], states: specdec.States, k: int) -> Draft:
            return Draft.by(self.name, ask(model, tokens, k, speculation=False)[len(tokens) :])

    ids = prompt(12, seed=6)[0].tolist()
    plain = ask(model, ids, 12, speculation=False, reuse=False)
    assert ask(model, ids, 12, drafter=Oracle(), draft_length=3) == plain
    assert model.last_stats.acceptance_rate == 1


def test_saving_a_conversation_while_others_go_on_from_it(model: specdec.SpecdecForCausalLM, tmp_path: Path) -> None:
    model.conversations.forget()
    ids = prompt(60, seed=8)[0].tolist()
    text = ask(model, ids, 20)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            ask(model, [*text[:-10], 5, 6], 6)

    threads = [threading.Thread(target=others) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        saved = 0
        while saved < 10:
            ask(model, ids, 20)
            # Refused while the conversation is another text's, and never a file of two texts.
            with contextlib.suppress(ValueError):
                model.save_conversation(tmp_path / f"talk{saved}", torch.tensor(text, dtype=torch.int64))
                saved += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    plain = ask(model, [*text, 9], 10, reuse=False, speculation=False)
    for i in range(10):
        model.conversations.forget()
        model.load_conversation(tmp_path / f"talk{i}")
        assert ask(model, [*text, 9], 10) == plain


def test_turns_are_given_in_the_order_of_asking() -> None:
    turns, order = Turns(), []

    def waiting(number: int) -> Callable[[], None]:
        def run() -> None:
            with turns():
                order.append(number)

        return run

    threads = [threading.Thread(target=waiting(i)) for i in range(5)]
    with turns(), turns():  # whoever has the turn may ask again
        for thread in threads:
            before = len(turns._waiting)
            thread.start()
            while len(turns._waiting) == before:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4]


def test_one_torch_thread_is_the_callers_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: list[int] = []
        with one_torch_thread():
            assert torch.get_num_threads() == 1
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
        assert seen == [2], "threads that begin meanwhile keep the number that the process was told"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
