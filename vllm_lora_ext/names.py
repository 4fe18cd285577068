"""Public names of adapters: what clients send as `model`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from vllm_lora_ext.spec import Finding

MAX_LENGTH = 64
# Words that vLLM gives a meaning of its own (content types, its adapters for warming up).
_RESERVED = re.compile(r"text|image|audio|video|input|warmup_\d+")
# What the server's routes for one adapter end in: /v1/adapters/{name}/rollback.
_ROUTE_ENDS = {"rollback", "traffic"}
_KINDS = {"L", "M", "N"}  # letters, their marks, digits
# Letters and marks that nobody sees, so that two names would look alike.
_INVISIBLE = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810)} | {
    *range(0xFE00, 0xFE10),
    *range(0xE0100, 0xE01F0),
}
_RULE = (
    "must be up to 64 letters, digits, '.', '-' and '_', with '/' between parts that begin with a letter, "
    "a digit or '_'"
)
_FIX = "Rename the folder, or give name=path."


def name_key(name: str) -> str:
    """Two names with one key are one name to people: `Xiaoli` and `xiaoli`, full and half width."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def judge_name(name: str, base_names: Collection[str] = ()) -> list[Finding]:
    """A public name must work as folder, as `model` in a request and in a URL, and be nobody else's."""
    if "@" in name:
        rule = "must not hold '@', which separates a name from its version"
        return [Finding("adapter_name_reserved", ascii_shown(name), rule, _FIX)]
    if problem := _problem(name):
        return [Finding("adapter_name_invalid", ascii_shown(name), problem, _FIX)]
    key = name_key(name)
    is_word = _RESERVED.fullmatch(key)
    if is_word or key in map(name_key, base_names):
        rule = "is a word with a meaning of its own" if is_word else "is the base model's name"
        return [Finding("adapter_name_reserved", name, rule, _FIX)]
    if "/" in key and key.rpartition("/")[2] in _ROUTE_ENDS:
        rule = "must not end in /rollback or /traffic, which mean something else in a URL"
        return [Finding("adapter_name_reserved", name, rule, _FIX)]
    return []


def taken(name: str) -> Finding:
    """The finding for a second adapter of one name."""
    rule, fix = "another adapter has this name", "Rename one of the two folders, or give name=path."
    return Finding("adapter_exists", name, rule, fix)


def _problem(name: str) -> str | None:
    if not 1 <= len(name) <= MAX_LENGTH:
        return _RULE
    if invisible := next((sign for sign in name if _is_invisible(sign)), None):
        return f"must not hold characters that nobody sees, such as U+{ord(invisible):04X}"
    if not all(map(_is_allowed, name)):
        return _RULE
    if not all(map(_is_part, name.split("/"))):
        return _RULE
    if ".." in name:
        return "must not hold '..'"
    if unicodedata.normalize("NFC", name) != name:
        return "must be in Unicode's composed form (NFC), or one name has two spellings"
    return None


def _is_part(part: str) -> bool:
    return part != "" and (part[0] == "_" or unicodedata.category(part[0])[0] in "LN")


def _is_allowed(sign: str) -> bool:
    if sign in "._-/":
        return True
    return unicodedata.category(sign)[0] in _KINDS


def _is_invisible(sign: str) -> bool:
    """So are joiners (U+200C, U+200D): some scripts write with them, and two names would look alike."""
    return unicodedata.category(sign) == "Cf" or ord(sign) in _INVISIBLE


def ascii_shown(name: str) -> str:
    """A name that may hold anything, as it may stand in a message."""
    text = repr(name)
    return text if len(text) <= 80 else text[:77] + "..."
