"""The processor of a multimodal model: text with pictures, sound and video in, a model's inputs out.

What: `Processor` is called as transformers' `Gemma4UnifiedProcessor` is, and returns the same names, types and values,
so that either can stand in for the other. Why our own: transformers' needs torchvision for pictures, torchcodec for
video and librosa for sound, and fetches whatever address a message names. Left out: masks of assistant tokens, which
training needs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from specdec.media.chat import list_conversations, medium_of, missing_medium, take_media, template_variables
from specdec.media.grouping import group_pictures, group_videos, list_sounds
from specdec.media.pictures import stack_patches
from specdec.media.reading import ReadVideo, read_picture, read_video
from specdec.media.settings import READERS, MediaSettings, arguments_of, sort_arguments, to_config, with_metadata
from specdec.media.sound import FRAME, cut_frames, read_sound
from specdec.media.video import open_clip
from specdec.weights.metadata import quote

_TOKENS = {
    "boi": "<|image>",
    "image": "<|image|>",
    "eoi": "<image|>",
    "boa": "<|audio>",
    "audio": "<|audio|>",
    "eoa": "<audio|>",
    "video": "<|video|>",
}
_KINDS = {"image": "picture", "video": "video", "audio": "sound"}
_TYPE_IDS = {"image": 1, "video": 2, "audio": 3}  # mm_token_type_ids; 0 is text


class Processor:
    """Make the inputs of a multimodal model of text, pictures, sound and video.

    A medium is a path, bytes, an open file, a data URI, base64, or an array; a picture may also be an image of Pillow,
    a video a list of pictures. Nothing is fetched from the web.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        settings: MediaSettings | None = None,
    ) -> None:
        """Keep the parts. Raises ValueError when the tokenizer has no tokens for media."""
        self.tokenizer, self.chat_template, self.settings = tokenizer, chat_template, settings or MediaSettings()
        tokens = {key: getattr(tokenizer, f"{key}_token", None) or usual for key, usual in _TOKENS.items()}
        ids = {key: _id_of(tokenizer, token) for key, token in tokens.items()}
        self.boi_token, self.image_token, self.eoi_token = tokens["boi"], tokens["image"], tokens["eoi"]
        self.boa_token, self.audio_token, self.eoa_token = tokens["boa"], tokens["audio"], tokens["eoa"]
        self.video_token = tokens["video"]
        self.image_token_id, self.audio_token_id, self.video_token_id = ids["image"], ids["audio"], ids["video"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Return the inputs of a model for one text or several, in which `<|image|>`, `<|audio|>` and `<|video|>` stand
        where media go.

        Args:
            images: a picture, a list of them in the order of the texts, or a list for each text.
            text: None stands for the pictures or sounds alone.
            videos: as `images`; a list of pictures is one video.
            audio: a sound, or a list of them in the order of the texts.
            kwargs: `max_soft_tokens` (70, 140, 280, 560 or 1120), `num_frames` or `fps`, `padding`, `return_tensors`,
                ..., flat or by medium (`images_kwargs={"max_soft_tokens": 1120}`).

        Raises:
            ValueError: a medium cannot be read, the text has more or fewer places than there are media, or an argument
                is unknown.
        """
        text_arguments, settings = sort_arguments(self.settings, kwargs)
        pictures, picture_counts = group_pictures(images)
        videos, video_counts = group_videos(videos)
        sounds = list_sounds(audio)
        if text is None:
            per_text = picture_counts or [len(pictures)] if pictures else []
            text = [" ".join([self.image_token] * count) for count in per_text] or [self.audio_token] * len(sounds)
        prompts = [text] if isinstance(text, str) else text
        if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"text is a string or a list of strings, not {quote(text)}")
        if not prompts:
            raise ValueError("there is nothing to process; pass text=, images= or audio=")
        self._check_places("image", prompts, len(pictures), picture_counts)
        self._check_places("video", prompts, len(videos), video_counts)
        self._check_places("audio", prompts, len(sounds), None)
        data: dict[str, Any] = {}
        instead = {
            self.image_token: self._add_pictures(data, pictures, settings),
            self.video_token: self._add_videos(data, videos, settings),
            self.audio_token: self._add_sounds(data, sounds, settings),
        }
        pattern = re.compile("|".join(map(re.escape, instead)))
        expanded = [pattern.sub(lambda match: next(instead[match.group()]), prompt) for prompt in prompts]
        texts = self._tokenize(expanded, text_arguments, settings)
        return BatchFeature(
            {**texts, **data}, tensor_type=settings.return_tensors, skip_tensor_conversion=["video_metadata"]
        )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a conversation as the model's chat template writes it, or with `tokenize=True` as a model's inputs.

        `conversation` is a list of messages or a list of such lists. A part of a message may be `{"type": "image",
        "path": ...}`, `"audio"` or `"video"`, with the medium under its type, "url", "path" or "base64", or a part of
        OpenAI's (`image_url`, `input_audio`). `load_audio_from_video` adds the sound of each video after its message's
        other parts. `processor_kwargs` go to the processor's call, and so do other arguments that the template has no
        use for. With `return_dict=True` all inputs are returned, else the token ids. Raises ValueError as the call
        does, without a chat template, and for an argument that neither the call nor the template takes.
        """
        if return_assistant_tokens_mask:
            raise ValueError("masks of an assistant's tokens are not made here; leave return_assistant_tokens_mask out")
        if isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        template = chat_template or self.chat_template
        if not isinstance(template, str):
            raise ValueError("this model has no chat template; pass chat_template=, or call the processor with text=")
        variables = template_variables(template)
        options = dict(arguments_of("processor_kwargs", processor_kwargs))
        options.update((key, value) for key, value in kwargs.items() if key not in variables)
        sort_arguments(self.settings, options, variables)
        conversations, batched = list_conversations(conversation)
        taken = [take_media(each, load_audio_from_video and tokenize) for each in conversations]
        prompts: list[str] = self.tokenizer.apply_chat_template(
            [messages for messages, _ in taken],
            chat_template=template,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **{key: kwargs[key] for key in kwargs.keys() & variables},
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        media = [each for _, each in taken]
        for kind in _KINDS:
            if any(medium is None for each in media for medium in getattr(each, kind)):
                raise ValueError(missing_medium(kind))
        bos = self.tokenizer.bos_token
        if bos is not None and prompts[0].startswith(bos):
            options["add_special_tokens"] = False
        inputs = self(
            text=prompts,
            images=[each.image for each in media],
            videos=[
                [video if isinstance(video, ReadVideo) else open_clip(video) for video in each.video] for each in media
            ],
            audio=[sound for each in media for sound in each.audio],
            **({**options, "return_tensors": return_tensors} if return_tensors else options),
        )
        return inputs if return_dict else inputs["input_ids"]

    def prepare(self, part: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Return a part of a message with its medium read and cut, for a conversation that asks about it repeatedly.

        `kwargs` are those of the call, and have to be those of the later call too. Raises ValueError as the call does.
        """
        _, settings = sort_arguments(self.settings, kwargs)
        kind, medium = medium_of(part)
        if kind == "image":
            return {"type": kind, kind: read_picture(medium, settings)}
        if kind == "video":
            return {"type": kind, kind: read_video(medium, None, settings)}
        return {"type": kind, kind: read_sound(medium)}

    def count_tokens(self, part: Mapping[str, Any]) -> int:
        """Return how many tokens of a prompt a part of `prepare` takes: soft tokens, their marks, times of frames."""
        kind, medium = medium_of(part)
        if kind == "video":
            return len(self.tokenizer(self._frames(medium), add_special_tokens=False).input_ids)
        return 2 + len(medium.values if kind == "image" else cut_frames(medium))

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Return the text of token ids, as the tokenizer's `decode` does."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """Return the texts of rows of token ids, as the tokenizer's `batch_decode` does."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        """Return the texts of generated ids: a step of transformers' pipelines."""
        return self.tokenizer.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def post_process_multimodal_output(
        self, generated_outputs: Any, skip_special_tokens: bool = True, generation_mode: Any = None, **kwargs: Any
    ) -> Any:
        """Return the texts of generated ids: a step of the pipeline "any-to-any". Raises ValueError for other modes."""
        if generation_mode not in (None, "text"):
            raise ValueError(f"this model answers in text alone; leave out generation_mode={generation_mode!r}")
        return self.post_process_image_text_to_text(generated_outputs, skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of all inputs that the processor makes."""
        return [
            *("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_position_ids"),
            *("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
            *("input_features", "input_features_mask"),
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer, chat template and settings to `folder`, for this and for transformers' processor."""
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.chat_template, str):
            (Path(folder) / "chat_template.jinja").write_text(self.chat_template, "utf-8")
        (Path(folder) / "processor_config.json").write_text(json.dumps(to_config(self.settings), indent=2), "utf-8")

    def _check_places(self, kind: str, prompts: Sequence[str], given: int, counts: list[int] | None) -> None:
        """Raise a ValueError when texts have more or fewer places for media of `kind` than are given."""
        token = {"image": self.image_token, "video": self.video_token, "audio": self.audio_token}[kind]
        places = [prompt.count(token) for prompt in prompts]
        if sum(places) != given or counts not in (None, places):
            raise ValueError(
                f"the texts have {places} places ({token}) for a {_KINDS[kind]}, and {counts or [given]} are given; "
                "give one for each place"
            )

    def _add_pictures(self, data: dict[str, Any], pictures: list[Any], settings: MediaSettings) -> Iterator[str]:
        """Add the inputs of pictures to `data`, and return the text that stands for each."""
        if not pictures:
            return iter(())
        cut = [read_picture(picture, settings) for picture in pictures]
        stacked = stack_patches(cut, settings.image_tokens)
        data.update(pixel_values=stacked.values, image_position_ids=stacked.positions)
        return (f"{self.boi_token}{self.image_token * len(each.values)}{self.eoi_token}" for each in cut)

    def _add_videos(self, data: dict[str, Any], videos: list[Any], settings: MediaSettings) -> Iterator[str]:
        if not videos:
            return iter(())
        described = with_metadata(settings.metadata, len(videos))
        read = [read_video(*one, settings) for one in zip(videos, described, strict=True)]
        stacked = stack_patches(
            list(chain(*(video.frames for video in read))), settings.frame_tokens, lambda x: x / 255
        )
        data.update(
            pixel_values_videos=stacked.values,
            video_position_ids=stacked.positions,
            num_frames_per_video=[len(video.frames) for video in read],
        )
        if settings.return_metadata:
            data["video_metadata"] = [video.metadata for video in read]
        return (self._frames(video) for video in read)

    def _frames(self, video: ReadVideo) -> str:
        """Return the text that stands for a video: the time of each frame, and its soft tokens."""
        soft = (f"{self.boi_token}{self.video_token * len(frame.values)}{self.eoi_token}" for frame in video.frames)
        return " ".join(f"{time} {frame}" for time, frame in zip(video.times, soft, strict=True))

    def _add_sounds(self, data: dict[str, Any], sounds: list[Any], settings: MediaSettings) -> Iterator[str]:
        if not sounds:
            return iter(())
        clips = [cut_frames(read_sound(sound)) for sound in sounds]
        counts = torch.tensor([len(clip) for clip in clips], dtype=torch.int64)
        longest = int(counts.max())
        features = torch.zeros((len(clips), longest, FRAME), dtype=torch.float32)
        for row, clip in zip(features, clips, strict=True):
            row[: len(clip)] = clip
        mask = torch.arange(longest, dtype=torch.int64) < counts[:, None]  # [clips, longest]
        as_numpy = settings.return_tensors is None
        data["input_features"] = features.numpy() if as_numpy else features
        data["input_features_mask"] = mask.numpy() if as_numpy else mask
        return (f"{self.boa_token}{self.audio_token * count}{self.eoa_token}" for count in counts.tolist())

    def _tokenize(self, prompts: Sequence[str], arguments: dict[str, Any], settings: MediaSettings) -> dict[str, Any]:
        texts = dict(self.tokenizer(prompts, **{"padding": True, **arguments}))
        types = {getattr(self, f"{kind}_token_id"): number for kind, number in _TYPE_IDS.items()}
        rows = [[types.get(token, 0) for token in row] for row in texts["input_ids"]]
        due = [sum(map(prompt.count, (self.image_token, self.video_token, self.audio_token))) for prompt in prompts]
        if [sum(map(bool, row)) for row in rows] != due:
            raise ValueError("a prompt was cut inside its media; leave truncation out, or raise max_length")
        return {**texts, "mm_token_type_ids": rows} if settings.return_types else texts


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or number == tokenizer.unk_token_id:
        raise ValueError(f"its tokenizer has no {token}, so that it reads text alone; {READERS}")
    if len(tokenizer(token, add_special_tokens=False).input_ids) != 1:
        tokenizer.add_tokens(token, special_tokens=True)  # in the vocabulary, but cut into pieces
    return int(number)
