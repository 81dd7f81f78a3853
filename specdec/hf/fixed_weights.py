"""Answers of a model whose weights stay as they were loaded: nothing moves, casts, trains or saves them.

What: `FixedWeights`, the part of `SpecdecForCausalLM` that answers torch's and transformers' methods for weights. Each
method keeps its promise where nothing has to change; otherwise it raises a ValueError that names what to write instead.
Why: weights are laid out for their device and their kernels while they load, and moved weights would have other bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from specdec.hf.weights import TokenEmbedding, count_weights, named_weights
from specdec.model.adapters.adapter import PLAIN, name_of
from specdec.model.adapters.build import load_adapter
from specdec.model.decoder import Decoder
from specdec.weights.hub.paths import adapter_path

Self = TypeVar("Self", bound="FixedWeights")


class FixedWeights:
    """Show the weights of `decoder` through transformers' methods, and refuse to move or change them. A mixin: it
    stands before transformers' classes."""

    decoder: Decoder
    device: Any
    dtype: Any

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Check that the model is on this device and in this dtype already. Raises ValueError for others."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is not None and device.type != self.device.type) or dtype not in (None, self.dtype):
            raise ValueError("a loaded model stays where it is; use specdec.load(..., device=..., dtype=...)")
        return self

    def cuda(self: Self, device: int | torch.device | None = None) -> Self:
        """Check that the model is on the GPU already. Raises ValueError otherwise."""
        return self.to("cuda")

    def cpu(self: Self) -> Self:
        """Check that the model is on the CPU already. Raises ValueError otherwise."""
        return self.to("cpu")

    def compile(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: there is nothing to compile."""
        raise ValueError("a loaded model runs compiled kernels already; call generate() as it is")

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert a trial tensor with `fn`, the conversion of `half()`, `float()` and their kin, and check the result
        with `to`."""
        moved: Tensor = fn(torch.empty(1, dtype=self.dtype, device=self.device))
        return self.to(moved.device, moved.dtype)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the weights by transformers' names, without gradients: to look at, with their device, dtype and count.

        A quantised matrix is expanded while the iterator is at it, so going through all of them takes time.
        """
        for name, weight in named_weights(self.decoder):
            yield (f"{prefix}.{name}" if prefix else name), weight

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the numbers in all weights, however many bits each is stored in."""
        return 0 if only_trainable else count_weights(self.decoder, not exclude_embeddings)

    def get_input_embeddings(self) -> TokenEmbedding:
        """Make a module that embeds token ids."""
        return TokenEmbedding(self.decoder)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Count the bytes of all weights, as stored."""
        return self.decoder.nbytes

    def load_adapter(self, peft_model_id: str | os.PathLike[str], adapter_name: str | None = None) -> None:
        """Read a low-rank adapter, a PEFT folder, a GGUF file or one of the hub, for `generate(adapter=adapter_name)`;
        without a name it is called as its folder or file. Weights stay as they are.

        Raises ValueError: see `specdec.load`, whose `adapter=` also makes an adapter the default.
        """
        name = adapter_name or name_of(Path(peft_model_id))
        load_adapter(self.decoder, name, adapter_path(peft_model_id))

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter that is loaded the one of calls that name none; "none": no adapter. Raises ValueError for
        another name."""
        self.decoder.adapters.default = self.decoder.adapters.resolve(adapter_name)

    def active_adapters(self) -> list[str]:
        """Return the name of the adapter of calls that name none; an empty list where they have no adapter."""
        return [self.decoder.adapters.default] if self.decoder.adapters.default else []

    def disable_adapters(self) -> None:
        """Let calls that name no adapter have none."""
        self.decoder.adapters.default = PLAIN

    def _keep_adapters(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            "adapters are loaded and named here, and trained with PEFT: load_adapter, generate(adapter=...)"
        )

    add_adapter = enable_adapters = delete_adapter = get_adapter_state_dict = _keep_adapters

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Raise ValueError for True: this model cannot be trained."""
        if requires_grad:
            raise ValueError("a loaded model answers and does not train; train with transformers, then specdec.load")
        return self

    def _keep_weights(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("weights are held in an inference layout; keep the checkpoint that this model was loaded from")

    save_pretrained = push_to_hub = state_dict = load_state_dict = init_weights = to_empty = _keep_weights
    set_input_embeddings = set_output_embeddings = resize_token_embeddings = _keep_weights

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: `specdec.load` makes these models."""
        raise ValueError("use specdec.load(name_or_path, dtype=, device=) instead of from_pretrained()")
