"""Tokenizers of the chat formats, small: a byte a token, the formats' own tokens, and templates that write them.

The templates are the project's own, for tests: they write what the models' templates write, without their options.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

GEMMA_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>",
    "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>")

GEMMA_TEMPLATE = """
{%- macro value(x) -%}
{%- if x is none -%}null{%- elif x is string -%}<|"|>{{ x }}<|"|>
{%- elif x is boolean -%}{{ 'true' if x else 'false' }}
{%- elif x is mapping -%}{{ pairs(x) }}
{%- elif x is sequence -%}[{%- for y in x -%}{{ ',' if not loop.first }}{{ value(y) }}{%- endfor -%}]
{%- else -%}{{ x }}{%- endif -%}
{%- endmacro -%}
{%- macro pairs(x) -%}
{ {%- for k, v in x | dictsort -%}{{ ',' if not loop.first }}{{ k }}:{{ value(v) }}{%- endfor -%} }
{%- endmacro -%}
{{- '<bos>' -}}
{%- set thinking = enable_thinking | default(false) -%}
{%- set rest = messages -%}
{%- if thinking or tools or messages[0].role == 'system' -%}
{{- '<|turn>system\n' -}}{{ '<|think|>\n' if thinking }}
{%- if messages[0].role == 'system' -%}{{ messages[0].content | trim }}{%- set rest = messages[1:] -%}{%- endif -%}
{%- for tool in tools or [] -%}
<|tool>declaration:{{ tool.function.name }}{{ pairs(tool.function) }}<tool|>{%- endfor -%}
{{- '<turn|>\n' -}}
{%- endif -%}
{%- set last = namespace(role='', user=-1) -%}
{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in rest -%}
{%- if m.role == 'tool' -%}
{{- '<|tool_response>response:' ~ (m.name or 'unknown') ~ '{value:' ~ value(m.content) ~ '}<tool_response|>' -}}
{%- set last.role = 'tool' -%}
{%- else -%}
{%- if not (m.role == 'assistant' and last.role == 'tool') -%}
{{- '<|turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' -}}
{%- endif -%}
{%- if m.reasoning_content and loop.index0 > last.user -%}
{{- '<|channel>thought\n' ~ m.reasoning_content ~ '\n<channel|>' -}}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{%- if call.function.arguments is string -%}{{ raise_exception('arguments must be a mapping') }}{%- endif -%}
{{- '<|tool_call>call:' ~ call.function.name ~ pairs(call.function.arguments) ~ '<tool_call|>' -}}
{%- endfor -%}
{{- m.content | trim -}}{{ '<turn|>\n' if not m.tool_calls }}
{%- set last.role = m.role -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if last.role == 'tool' -%}{{ '<|channel>thought\n' if thinking }}
{%- else -%}{{ '<|turn>model\n' }}{{ '<|channel>thought\n<channel|>' if not thinking }}{%- endif -%}
{%- endif -%}
"""
QWEN_TEMPLATE = """
{%- if tools -%}
{{- '<|im_start|>system\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}
{%- for tool in tools -%}{{ '\n' ~ (tool | tojson) }}{%- endfor -%}{{ '<|im_end|>\n' }}
{%- endif -%}
{%- for m in (messages[1:] if tools and messages[0].role == 'system' else messages) -%}
{{- '<|im_start|>' ~ ('user' if m.role == 'tool' else m.role) ~ '\n' -}}
{%- if m.role == 'tool' -%}{{ '<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
{%- else -%}{{ m.content }}{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{- '\n<tool_call>\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) }}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}
"""
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Gemma 4's way: spaces as sentencepiece writes them, bytes of what is no ASCII; 15 + 256 + 96 tokens."""
    names = [*GEMMA_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127)), "\n"]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<pad>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in GEMMA_TOKENS])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    made.chat_template = GEMMA_TEMPLATE
    return made


@cache
def byte_tokenizer(tags: bool = True) -> PreTrainedTokenizerFast:
    """Qwen's way: byte-level, with tags for calls and thoughts as tokens; or, without `tags`, SmolLM2's."""
    special = QWEN_TOKENS[:3]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {name: i for i, name in enumerate([*(QWEN_TOKENS if tags else special), *letters])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    if tags:
        backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in QWEN_TOKENS[3:]])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = QWEN_TEMPLATE if tags else PLAIN_TEMPLATE
    return made
