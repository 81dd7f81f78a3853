"""Names that the commands know: ways to decode that a bench compares (`eval.bench.modes`), shapes of models of full
size (`eval.synthetic.full_size`). The names lie apart from those modules, so that an error for a mistyped name comes
before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.util.text import did_you_mean

NGRAM = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")  # llama.cpp's, without a model
PLAIN = "plain"  # what all others are measured against
ADAPTIVE = "adaptive"
GROUPS = {"fixed": [f"k{n}" for n in range(1, 7)], "llama.cpp-ngram": [f"llama.cpp-{kind}" for kind in NGRAM]}
OTHERS = ("transformers", "transformers-lookup", "llama.cpp", *GROUPS["llama.cpp-ngram"])
OURS = (PLAIN, ADAPTIVE, "suffix", "mtp", "wrong")
DRAFTER_SUFFIX = ".drafter.json"  # of the config of the assistant that was published for a shape


def expand_modes(words: Sequence[str]) -> list[str]:
    """Return the modes that `words` name: `plain` first, groups in full, every mode once.

    Raises:
        ValueError: a word names no mode.
    """
    names = [PLAIN]
    for word in words:
        for name in GROUPS.get(word, [word]):
            known = name in OURS or name in OTHERS or (name[:1] == "k" and name[1:].isdecimal())
            if not known:
                every = (*OURS, "k1", *OTHERS, *GROUPS)
                raise ValueError(
                    f"--modes {name}: there is none.{did_you_mean(name, every)} Choose from {', '.join(every)}"
                )
            if name not in names:
                names.append(name)
    return names


def full_size_names() -> list[str]:
    """List the shapes in `eval/synthetic/configs/`."""
    from importlib import resources  # 50 ms, which `--help` does not need

    files = (file.name for file in (resources.files("eval.synthetic") / "configs").iterdir())
    names = (name.removesuffix(".json") for name in files if name.endswith(".json"))
    return sorted(name for name in names if not f"{name}.json".endswith(DRAFTER_SUFFIX))
