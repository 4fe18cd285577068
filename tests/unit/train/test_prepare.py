"""From settings to examples: every row read is trained on, held out, or counted as left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.config import TrainConfig
from train.prepare import Prepared, prepare, read_configured
from vllm_lora_ext.errors import BadData

ROWS = [{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(20)]
REFUSED = {"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}
STRICT = (
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
)


def prepared(tmp_path: Path, tokenizer: Any, rows: list[Any], **settings: Any) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"base_model": "base", "data": (str(path),), "name": "x", "output_dir": "out", **settings}
    config = TrainConfig(**options)
    return prepare(read_configured(config), config, tokenizer)


def test_every_row_is_somewhere(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*ROWS, {"instruction": "long " * 300, "output": "x"}, {"instruction": "a"}]
    found = prepared(tmp_path, tokenizer, rows, skip_bad_rows=True, validation_split=0.2)
    assert (found.training_rows, found.held_out_rows, len(found.bad)) == (16, 4, 1)
    assert (len(found.training), len(found.too_long)) == (16, 1)


def test_weights_repeat_what_is_trained_and_not_what_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    found = prepared(tmp_path, tokenizer, ROWS, data_weights=(3.0,), validation_split=0.2)
    assert (len(found.training), len(found.held_out), found.training_rows) == (48, 4, 16)
    assert found.findings == []
    assert not {example.where for example in found.training} & {example.where for example in found.held_out}


def test_the_system_prompt_stands_in_every_row(tmp_path: Path, tokenizer: Any) -> None:
    found = prepared(tmp_path, tokenizer, ROWS, system_prompt="Be kind.")
    for example in [*found.training, *found.held_out]:
        assert tokenizer.decode(list(example.input_ids)).startswith("<|im_start|>system\nBe kind.")


def test_rows_that_the_template_refuses_are_bad_rows(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", STRICT)
    with pytest.raises(BadData, match=r"row.*line 21: .*user, user.*1 of 2\d rows.*skip-bad-rows"):
        prepared(tmp_path, tokenizer, [*ROWS, REFUSED], validation_split=0.0)
    for share in (0.0, 0.9):
        found = prepared(
            tmp_path,
            tokenizer,
            [*ROWS, REFUSED],
            skip_bad_rows=True,
            validation_split=share,
            data_weights=(2,),
        )
        assert len(found.bad) == 1
        assert found.training_rows + found.held_out_rows == 20


def test_rows_without_a_trained_answer_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    with pytest.raises(BadData, match="have no answer to train on"):
        prepared(tmp_path, tokenizer, [{"messages": turns}])
