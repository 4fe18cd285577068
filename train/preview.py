"""Rows as the model will see them: token ids and text, with what carries loss in colour and in brackets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from train.prompts import Example

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_TRAINED = "bold green"


def first_rows(examples: Sequence[Example], count: int) -> list[Example]:
    """The examples of the first `count` rows; a row may have several."""
    places = list(dict.fromkeys(example.where for example in examples))[:count]
    return [example for example in examples if example.where in places]


def preview(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, count: int, file: IO[str] | None = None
) -> None:
    """Print the first `count` rows: place, ids with [the trained ones], text with ⟦the trained parts⟧.

    `file` is stdout unless stated. Colours are used where it is a terminal.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)
    for example in first_rows(examples, count):
        trained, tokens = example.trained_tokens, len(example.input_ids)
        console.print(f"{example.where}: {tokens} tokens, {trained} of them trained", style="bold")
        console.print(_ids_text(example))
        console.print(_rendered_text(example, tokenizer))
        console.print()


def preview_dict(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """An example as JSON has it: `text` is in parts, each trained or not."""
    return {
        "row": example.where,
        "input_ids": list(example.input_ids),
        "trained": [list(span) for span in example.trained],
        "text": [
            {"trained": trained, "text": _decode(ids, tokenizer)} for trained, ids in _segments(example)
        ],
    }


def _segments(example: Example) -> list[tuple[bool, tuple[int, ...]]]:
    """The ids in runs: (whether they carry loss, ids)."""
    segments, place = [], 0
    for start, end in example.trained:
        segments += [(False, example.input_ids[place:start]), (True, example.input_ids[start:end])]
        place = end
    segments.append((False, example.input_ids[place:]))
    return [(trained, ids) for trained, ids in segments if ids]


def _ids_text(example: Example) -> Text:
    from rich.text import Text

    runs = [
        (f"[{' '.join(map(str, ids))}]", _TRAINED) if trained else (" ".join(map(str, ids)), "dim")
        for trained, ids in _segments(example)
    ]
    return Text(" ").join(Text(text, style) for text, style in runs)


def _rendered_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    from rich.text import Text

    shown = Text()
    for trained, ids in _segments(example):
        text = _printable(_decode(ids, tokenizer))
        shown.append(f"⟦{text}⟧" if trained else text, _TRAINED if trained else "")
    return shown


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _printable(text: str) -> str:
    """Somebody else's text as it may stand on a terminal: line breaks as they are, controls written out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )
