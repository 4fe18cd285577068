"""Coverage-guided fuzzing of the two parsers that see a tenant's bytes, with atheris.

pip install -e '.[fuzz]'
python -m tests.fuzz.parsers json|header [libFuzzer flags, for example -max_total_time=60]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import atheris

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

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
