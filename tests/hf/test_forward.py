"""`model(...)`: the forward pass takes what transformers' takes, or says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec.hf import SpecdecForCausalLM
from tests.support.tiny import FAMILIES, VOCAB, prompt, tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def loaded(family: str, folder: Path) -> SpecdecForCausalLM:
    tiny_model(family).save_pretrained(folder)
    return specdec.load(folder, drafter=None, device="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpecdecForCausalLM:
    return loaded("gemma3", tmp_path_factory.mktemp("tiny-gemma3"))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat((prompt(30, seed=1), prompt(30, seed=2)))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return ids, mask


@pytest.mark.parametrize("keep", [2, 0, 99, torch.tensor(3), torch.tensor([1, 28, -1]), torch.tensor([[3, 4], [9, 0]])])
def test_logits_to_keep(model: SpecdecForCausalLM, keep: int | torch.Tensor) -> None:
    ids, _ = batch()
    if isinstance(keep, torch.Tensor) and keep.dim() == 2:
        theirs = tiny_model("gemma3")(ids).logits.take_along_dim(keep[..., None], dim=1)
    elif isinstance(keep, torch.Tensor) and keep.dim() == 0:
        theirs = tiny_model("gemma3")(ids, logits_to_keep=int(keep)).logits
    else:
        theirs = tiny_model("gemma3")(ids, logits_to_keep=keep).logits
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, theirs, **CLOSE)


def test_logits_to_keep_by_mask(model: SpecdecForCausalLM) -> None:
    ids, mask = batch()
    picked = model(ids, attention_mask=mask, logits_to_keep=mask.bool()).logits
    assert torch.equal(picked, model(ids, attention_mask=mask).logits[mask.bool()])


def test_loss_as_transformers_reckons_it(model: SpecdecForCausalLM) -> None:
    ids, _ = batch()
    labels = ids.clone()
    labels[:, :10] = -100
    theirs = tiny_model("gemma3")
    torch.testing.assert_close(model(ids, labels=labels).loss, theirs(ids, labels=labels).loss)
    mine = model(ids, labels=labels, num_items_in_batch=torch.tensor(17), logits_to_keep=2)
    torch.testing.assert_close(mine.loss, theirs(ids, labels=labels, num_items_in_batch=torch.tensor(17)).loss)
    assert mine.logits.shape == (2, 2, VOCAB)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_transformers(family: str, tmp_path: Path) -> None:
    ids, mask = batch()
    theirs = tiny_model(family)(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    mine = loaded(family, tmp_path)(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(mine) == len(theirs)
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours[mask.bool()], other[mask.bool()], rtol=1e-3, atol=1e-3)


def test_tuples(model: SpecdecForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, _ = batch()
    [logits] = model(ids, return_dict=False, use_cache=False)
    assert torch.equal(logits, model(ids).logits)
    loss, logits, cache, hidden = model(ids, labels=ids, return_dict=False, output_hidden_states=True)
    assert loss.shape == () and cache.get_seq_length() == 30 and len(hidden) == 4
    monkeypatch.setattr(model.config, "return_dict", False)
    assert isinstance(model(ids), tuple)


# Decoding by hand


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "qwen3-yarn"])
def test_a_loop_by_hand_writes_what_generate_does(family: str, tmp_path: Path) -> None:
    model, ids = loaded(family, tmp_path), prompt(20, seed=4)
    past, current, out = None, ids, []
    for _ in range(30):
        result = model(current, past_key_values=past)
        past, current = result.past_key_values, result.logits[:, -1:].argmax(-1)
        out.append(int(current))
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert out == expected[0, 20:].tolist()
    assert past.get_seq_length() == 49
    assert torch.equal(result.logits[:, -1], model(expected[:, :-1]).logits[:, -1])


@pytest.mark.parametrize("counted", [False, True])
def test_a_padded_batch_by_hand(model: SpecdecForCausalLM, counted: bool) -> None:
    ids, mask = batch()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    past, current = None, ids
    for step in range(12):
        positions = (mask.cumsum(-1) - 1)[:, -current.shape[1] :] if counted else None
        result = model(current, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True)
        past, current = result.past_key_values, result.logits[:, -1:].argmax(-1)
        assert torch.equal(current[:, 0], expected[:, 30 + step])
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)


def test_without_use_cache_nothing_is_kept(model: SpecdecForCausalLM) -> None:
    assert model(prompt(5), use_cache=False).past_key_values is None


REFUSALS: dict[str, dict[str, Any]] = {
    "attention maps": {"output_attentions": True},
    "input_ids": {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 64)},
    "needs input_ids": {"input_ids": None},
    "Images and sound of other models": {"pixel_values": torch.zeros(1, 3, 8, 8)},
    "returned before, got a DynamicCache": {"past_key_values": DynamicCache()},
    "positions with a gap": {"position_ids": torch.tensor([[0, 1, 2, 30, 31]])},
    "positions": {"position_ids": torch.zeros(3, 2, 5, dtype=torch.long)},
    "masked tokens out of the middle": {"attention_mask": torch.tensor([[1, 1, 0, 1, 1]])},
    r"attention_mask must be \[batch, n\] = \[1, 5\]": {"attention_mask": torch.ones(1, 1, 5, 5)},
    r"0\.\.255": {"input_ids": torch.tensor([[3, 256]])},
    r"token ids \[batch, n\]": {"input_ids": torch.tensor([3, 4])},
    "logits_to_keep must be": {"logits_to_keep": torch.zeros(1, 2, 3, dtype=torch.long)},
    "cache_position is not supported": {"cache_position": torch.arange(5)},
}


@pytest.mark.parametrize(("message", "arguments"), REFUSALS.items(), ids=list(REFUSALS))
def test_what_cannot_be_honoured_is_refused(model: SpecdecForCausalLM, message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": prompt(5), **arguments})


def test_a_cache_belongs_to_its_model_its_rows_and_its_mask(model: SpecdecForCausalLM, tmp_path: Path) -> None:
    ids, mask = batch()
    past = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="of 2 rows and input_ids of 1"):
        model(prompt(1), past_key_values=past)
    with pytest.raises(ValueError, match="keeps other tokens"):
        model(ids[:, :1], attention_mask=torch.ones(2, 31), past_key_values=past)
    with pytest.raises(ValueError, match=r"columns so far \+ n\] = \[2, 31\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 1), past_key_values=past)
    with pytest.raises(ValueError, match="positions with a gap"):
        model(ids[:, :1], position_ids=torch.tensor([[40], [40]]), past_key_values=past)
    with pytest.raises(ValueError, match="what this model's forward"):
        loaded("gemma3", tmp_path)(ids[:, :1], past_key_values=past)
    assert past.get_seq_length() == 30  # refused before anything went in


def test_positions_that_leave_no_gap_are_taken(model: SpecdecForCausalLM) -> None:
    ids, mask = batch()
    plain = model(ids, attention_mask=mask).logits
    for positions in (mask.cumsum(-1) - 1, torch.arange(30)[None], torch.arange(30).expand(2, -1)):
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, plain)
    assert torch.equal(model(ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).logits, plain)
    padded = mask.flip(1)  # on the right
    assert torch.equal(model(ids, attention_mask=padded).logits[0, :21], model(ids[:1, :21]).logits[0])
    assert not model(ids, attention_mask=torch.zeros_like(ids)).logits.any()
