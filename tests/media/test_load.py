"""`specdec.load_processor`: which folders it takes, and what the folder's settings say."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import specdec
from specdec.media import source
from specdec.media.processor import Processor
from specdec.media.settings import MediaSettings
from tests.support.media.clips import moving
from tests.support.media.pictures import noise
from tests.support.media.tokenizer import MEDIA_TEMPLATE, MEDIA_TOKENS, VIDEO_TOKEN, media_tokenizer
from tests.support.tiny_folder import make_folder, tiny_tokenizer
from tests.support.tiny_gguf import ALPHABET, byte_level


def save(folder: Path, settings: MediaSettings | None = None, model_type: str = "gemma4_unified") -> Path:
    Processor(media_tokenizer(), MEDIA_TEMPLATE, settings).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_processor_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    for number, settings in enumerate(
        [MediaSettings(), MediaSettings(560, 140, 8), MediaSettings(fps=2.0, num_frames=None)]
    ):
        processor = specdec.load_processor(save(tmp_path / str(number), settings))
        assert processor.settings == settings and processor.chat_template == MEDIA_TEMPLATE
    prompt = [{"role": "user", "content": [{"type": "video", "video": moving(3)}]}]
    first, second = (
        each.apply_chat_template(prompt, tokenize=True, return_dict=True, processor_kwargs={"num_frames": 2})
        for each in (processor, Processor(media_tokenizer(), MEDIA_TEMPLATE))
    )
    assert first["input_ids"] == second["input_ids"]
    assert torch.equal(first["pixel_values_videos"], second["pixel_values_videos"])


@pytest.mark.parametrize(
    ("part", "values", "words"),
    [
        ("image_processor", {"max_soft_tokens": 256}, "one of 70"),
        ("image_processor", {"patch_size": 14}, "patch_size .* is not 16"),
        ("video_processor", {"pooling_kernel_size": 2}, "pooling_kernel_size .* is not 3"),
        ("video_processor", {"num_frames": "many"}, "whole number"),
        ("feature_extractor", {"sampling_rate": 24_000}, "sampling_rate .* is not 16000"),
        ("image_processor", [], None),
        ("image_processor", {"size": {"height": 224, "width": 224}}, None),  # some conversions say so; nothing uses it
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, part: str, values: object, words: str | None) -> None:
    (save(tmp_path) / "processor_config.json").write_text(json.dumps({part: values}))
    if words is None:
        assert specdec.load_processor(tmp_path).settings == MediaSettings()
    else:
        with pytest.raises(ValueError, match=words):
            specdec.load_processor(tmp_path)


def test_a_model_of_text_alone_or_with_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a gemma3_text model"):
        specdec.load_processor(make_folder(tmp_path / "text"))
    with pytest.raises(ValueError, match="a gemma4 model"):
        specdec.load_processor(save(tmp_path / "encoder", model_type="gemma4"))
    with pytest.raises(ValueError, match="a gemma4_unified_text model"):
        specdec.load_processor(make_folder(tmp_path / "text of it", "gemma4_unified"))
    tiny_tokenizer().save_pretrained(save(tmp_path / "no tokens"))
    with pytest.raises(ValueError, match="reads text alone"):
        specdec.load_processor(tmp_path / "no tokens")
    with pytest.raises(ValueError, match="there is no such file"):
        specdec.load_processor("no/such/folder/anywhere")


def test_a_gguf_file_has_tokens_and_template_and_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ALPHABET, "he", *MEDIA_TOKENS.values(), VIDEO_TOKEN]
    about = {"tokens": tokens, "token_type": [3] * 3 + [1] * 257 + [3] * 7, "merges": ["h e"]}
    file = byte_level(tmp_path / "m.gguf", **about, **{"tokenizer.chat_template": MEDIA_TEMPLATE})
    processor = specdec.load_processor(file)
    assert processor.settings == MediaSettings()
    prompt = [
        {"role": "user", "content": [{"type": "image", "image": noise(100, 150, 3)}, {"type": "text", "text": "a"}]}
    ]
    ids = processor.apply_chat_template(prompt, tokenize=True, processor_kwargs={"max_soft_tokens": 70})[0]
    assert processor.image_token_id == tokens.index("<|image|>") and ids.count(processor.image_token_id) == 60
    with pytest.raises(ValueError, match="reads text alone"):
        specdec.load_processor(byte_level(tmp_path / "text.gguf"))


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    (save(tmp_path / "m") / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match=str(tmp_path / "m")):
        specdec.load_processor(tmp_path / "m")


def test_without_the_extra_the_command_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    folder = save(tmp_path)
    load_processor = specdec.load_processor  # imported before the libraries are gone
    monkeypatch.setattr(source, "importlib", SimpleNamespace(import_module=missing))
    with pytest.raises(ImportError, match=r"a picture needs Pillow .*pip install .* '\.\[media\]'"):
        load_processor(folder)


def test_no_module_imports_a_library_of_the_extra_before_it_is_needed() -> None:
    for path in Path(source.__file__).parent.glob("*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        names = [alias.name for each in statements if isinstance(each, ast.Import) for alias in each.names]
        names += [str(each.module) for each in statements if isinstance(each, ast.ImportFrom)]
        assert not {"PIL", "av", "soundfile", "soxr"} & {name.partition(".")[0] for name in names}, path
