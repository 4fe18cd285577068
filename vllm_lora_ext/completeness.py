"""Whether an adapter folder is all there, or somebody is still writing it.

Only what waiting can cure counts as incomplete; what is wrong for good is left to admission, which refuses
it with its reason. Of the weights no more than the header is read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from vllm_lora_ext.files import NotRegularFile, RegularFile, TooLarge, read_whole
from vllm_lora_ext.inspection import SOURCE_FILES
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_CONFIG_BYTES, PICKLES, WEIGHTS_FILE
from vllm_lora_ext.spec import printable
from vllm_lora_ext.strict_json import JsonRefused, parse_object
from vllm_lora_ext.tensor_file import MAX_HEADER_BYTES

# Where each tensor ends. In a string of the header these quotes would have backslashes before them.
_END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d{1,19}\s*,\s*(\d{1,19})\s*\]')
# rsync writes a file under such a name until it is whole; until then the old one stands beside it.
_PARTIAL = re.compile(rf"\.({'|'.join(map(re.escape, SOURCE_FILES))})\.\w{{6}}")


def incomplete(folder: Path) -> str | None:
    """Why a folder is not complete yet; None if it is, or if waiting would not help."""
    return _of_config(folder / CONFIG_FILE) or _of_weights(folder) or _of_copies(folder)


def _of_config(path: Path) -> str | None:
    try:
        data = read_whole(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        return f"{CONFIG_FILE} is not there"
    except (OSError, NotRegularFile, TooLarge):
        return None
    except ValueError:  # it became shorter
        return f"{CONFIG_FILE} is being written"
    try:
        parse_object(data)
    except JsonRefused as error:
        return f"{CONFIG_FILE} {error.rule}" if _is_cut(data, error) else None
    return None


def _is_cut(data: bytes, error: JsonRefused) -> bool:
    """Whether JSON that cannot be read may be the beginning of an object, or space reserved for one."""
    if error.code != "not_json":
        return False
    if not data.rstrip().endswith(b"}"):
        return True
    cause = error.__cause__
    if not isinstance(cause, json.JSONDecodeError):
        return False
    return cause.pos >= len(cause.doc.rstrip()) or cause.msg.startswith("Unterminated string")


def _of_weights(folder: Path) -> str | None:
    try:
        with RegularFile(folder / WEIGHTS_FILE) as file:
            return _of_header(file)
    except FileNotFoundError:
        if any(os.path.lexists(folder / name) for name in PICKLES):
            return None
        return f"{WEIGHTS_FILE} is not there"
    except (OSError, NotRegularFile):
        return None
    except ValueError:  # it became shorter
        return f"{WEIGHTS_FILE} is being written"


def _of_header(file: RegularFile) -> str | None:
    """Why the file does not have the size that its header states."""
    if file.size < 8:
        return f"{WEIGHTS_FILE} has {file.size} bytes, too few for a header"
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        return None
    if length > file.size - 8:
        return f"{WEIGHTS_FILE} has {file.size} bytes, too few for its header of {length}"
    header = file.read(length, 8)
    if not length or b"\0" in header:  # some copies reserve the space first
        return f"{WEIGHTS_FILE} has a header that is not written yet"
    ends = [int(end) for end in _END.findall(header)]
    if not ends or file.size == (stated := 8 + length + max(ends)):
        return None
    return f"{WEIGHTS_FILE} has {file.size} bytes, its header states {stated}"


def _of_copies(folder: Path) -> str | None:
    try:
        with os.scandir(folder) as entries:
            partial = next((entry.name for entry in entries if _PARTIAL.fullmatch(entry.name)), None)
    except OSError:
        return None
    return None if partial is None else f"{printable(partial)} is there, which a copy leaves once it is done"
