"""A model whose next token follows from the last one by a table, as a folder: its answers are short and known.

Text runs through the alphabet and ends, a thought runs through the capitals, strings and numbers of JSON are short.
With one-hot embeddings, and layers that add nothing, the output matrix is the table. Everything else is as in any
model: caches, drafts, grammars, a byte-level tokenizer with tags for calls and thoughts, and a chat template.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests.support.formats.tiny_chat import byte_tokenizer

CONTEXT = 32768
ANSWER, THOUGHT = ascii_lowercase, ascii_uppercase
_HIDDEN = 288
_LIKED = ("<|im_end|>", '"', "}", "]", ",", "{", "<tool_call>", "a", "3", "t", "[")  # after any token, best first
_STEP = 4.0  # between their scores: penalties of a request are smaller
_TEMPLATE = """
{%- set rest = messages -%}
{%- if messages[0].role == 'system' -%}{%- set rest = messages[1:] -%}{%- endif -%}
{%- if tools or messages[0].role == 'system' -%}
{{- '<|im_start|>system\n' }}{{ messages[0].content if messages[0].role == 'system' }}
{%- for tool in tools or [] -%}{{ '\n' ~ (tool | tojson) }}{%- endfor -%}{{ '<|im_end|>\n' }}
{%- endif -%}
{%- for m in rest -%}
{{- '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' -}}
{%- if m.reasoning_content -%}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{%- endif -%}
{{- '<tool_response>\n' ~ m.content ~ '\n</tool_response>' if m.role == 'tool' else m.content -}}
{%- for call in m.tool_calls or [] -%}
{{- '\n' if m.content or not loop.first -}}
{{- '<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' }}{{ '<think>' if enable_thinking is defined and enable_thinking }}
{%- endif -%}
"""


def make_table_folder(folder: Path) -> Path:
    """Fill `folder` with the model and its tokenizer."""
    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab()
    followers = {
        **dict(itertools.pairwise(ANSWER)),
        **dict(itertools.pairwise(THOUGHT)),
        **{THOUGHT[-1]: "</think>", "</think>": ANSWER[0], "<think>": THOUGHT[0], "Ċ": ANSWER[0], '"': "s"},
    }
    table = torch.zeros(len(vocab), len(vocab))  # [last, next]
    for rank, token in enumerate(_LIKED):
        table[:, vocab[token]] = _STEP * (len(_LIKED) - rank)
    for last, following in followers.items():
        table[vocab[last], vocab[following]] = _STEP * (len(_LIKED) + 1)
    table[vocab["</tool_call>"], vocab["Ċ"]] = _STEP * len(_LIKED) - 0.5  # another call is nearly as good as the end
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=_HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(vocab), _HIDDEN))
        model.lm_head.weight.zero_()
        # The last norm makes sqrt(hidden) of the one.
        model.lm_head.weight[:, : len(vocab)] = table.T / math.sqrt(_HIDDEN)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.chat_template, before = _TEMPLATE, tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = before  # the tokenizer is shared
    return folder
