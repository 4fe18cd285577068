"""The base model of the history test: random weights, and a tokenizer with a word for every id."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models import SHAPES, make_random_base

_SHAPE = "many-words"
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def make_base(folder: Path) -> Path:
    """Write it to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make_random_base(folder, _SHAPE)
    # A Qwen2 base gets byte-level BPE from transformers, whatever its files say of the kind.
    words = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words |= {f"w{number}": number for number in range(len(words), SHAPES[_SHAPE].vocabulary)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    last = f"w{SHAPES[_SHAPE].vocabulary - 1}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=last, pad_token=last, unk_token=last
    ).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder
