"""Coverage-guided fuzzing of the two parsers that see a tenant's bytes, with atheris.

pip install -e '.[fuzz]'
python -m tests.fuzz.parsers json|header [libFuzzer flags, for example -max_total_time=60]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

from tests.fuzz.strategies import GOOD_CONFIG

with atheris.instrument_imports(include=["vllm_lora_ext"]):
    from vllm_lora_ext.files import RegularFile
    from vllm_lora_ext.strict_json import JsonRefused, parse_object
    from vllm_lora_ext.tensor_file import HeaderRefused, read_header


def parse_json(data: bytes) -> None:
    """Whatever is taken has to be what Python's own parser reads."""
    try:
        body = parse_object(data)
    except JsonRefused:
        return
    assert json.loads(data) == body


def parse_header(data: bytes) -> None:
    """Whatever is taken has to cover the file exactly."""
    memory = os.memfd_create("weights")
    try:
        os.write(memory, data)
        with RegularFile(Path(f"/proc/self/fd/{memory}")) as file:
            places = read_header(file)
            assert sum(place.size for place in places) == len(data) - min(
                [p.offset for p in places], default=len(data)
            )
    except HeaderRefused:
        return
    finally:
        os.close(memory)


TARGETS = {"json": parse_json, "header": parse_header}

SEEDS = {
    "json": [json.dumps(GOOD_CONFIG).encode(), b'{"a": [1, 2.5e3, {"b": null}], "a": true}', b'{"a": NaN}'],
    "header": [
        (len(text)).to_bytes(8, "little") + text + bytes(24)
        for text in (
            b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
            b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[12],"data_offsets":[0,24]}}',
        )
    ],
}

if __name__ == "__main__":
    kind = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[kind]):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, corpus], TARGETS[kind])
        atheris.Fuzz()
