"""The bad-input catalogue of adapters, as a table: what is done to a good folder, and the code of the answer.

Each case gets a folder that admission takes and spoils it. `code` is None for what looks odd and is fine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class BadAdapter:
    """`row` is the catalogue's number; `spoil` changes the folder; `code` is the finding that answers."""

    row: str
    what: str
    spoil: Callable[[Path], object]
    code: str | None
    security: bool = False  # `--allow` must not lift it
    uploads_only: bool = False  # refused only where links may not be followed

    def __str__(self) -> str:
        return f"{self.row}-{self.what}".replace(" ", "_")


def config(**changes: Any) -> Callable[[Path], object]:
    """Change keys of the config; None as `...` removes one."""

    def spoil(folder: Path) -> None:
        body = json.loads((folder / CONFIG).read_text()) | changes
        body = {key: value for key, value in body.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(body))

    return spoil


def raw_config(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_bytes(data)


def tensors(**changes: np.ndarray | None) -> Callable[[Path], object]:
    """Change or remove (None) tensors of layer 0's q_proj: `A` and `B`."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        for side, value in changes.items():
            name = f"{STEM}.lora_{side}.weight"
            weights.pop(name)
            if value is not None:
                weights[name] = value
        save_file(weights, folder / WEIGHTS)

    return spoil


def every_tensor(
    change: Callable[[str, np.ndarray], tuple[str, np.ndarray] | None],
) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        changed = [change(name, value) for name, value in load_file(folder / WEIGHTS).items()]
        save_file(dict(item for item in changed if item), folder / WEIGHTS)

    return spoil


def raw_weights(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(data)


def header(entries: str, data: bytes = b"") -> bytes:
    """A weights file with this text as its header."""
    text = entries.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(name: str, first: int, last: int, shape: str = "[2]", dtype: str = "F32") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{first},{last}]}}'


def first_value(value: float) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        weights[f"{STEM}.lora_A.weight"][0, 0] = value
        save_file(weights, folder / WEIGHTS)

    return spoil


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def truncated(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def appended(data: bytes) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        with (folder / WEIGHTS).open("ab") as file:
            file.write(data)

    return spoil


def moved_and_linked(name: str, link: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        target = folder.parent / f"outside-{name}"
        shutil.move(folder / name, target)
        link(folder / name, target)

    return spoil


def duplicated_tensor(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode().rstrip()
    first = text[1 : text.index("}") + 1] if not text.startswith('{"__metadata__"') else None
    name = f"{STEM}.lora_A.weight"
    start = text.index(f'"{name}"')
    first = text[start : text.index("}", start) + 1]
    (folder / WEIGHTS).write_bytes(header(text[:-1] + "," + first + "}", raw[8 + length :]))


def sparse(folder: Path) -> None:
    """1 TB that takes no room on the disk."""
    os.truncate(folder / WEIGHTS, 1 << 40)


def crowded(folder: Path) -> None:
    for number in range(10_001):
        (folder / str(number)).touch()


def with_checksum(folder: Path) -> None:
    (folder / "identity.json").write_text(json.dumps({"files": {WEIGHTS: "0" * 64}}))


def pickled(name: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")

    return spoil


def unix_socket(path: Path) -> None:
    """A socket by a short name, since an address has at most 107 bytes."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def template(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def scaled(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    return name, value * 0 if "lora_B" in name else value


HOSTILE = r"(.|.)+\d\d\d"
NARROW = np.zeros((8, 32), np.float32)
WIDE = np.zeros((8, 128), np.float32)
NEW_EMBEDDINGS = np.zeros((520, 64), np.float32)
DEEP = b'{"a":' * 200 + b"1" + b"}" * 200
LONG_NUMBER = b'{"r": ' + b"9" * 5000 + b"}"
METADATA_ONLY = header('{"__metadata__":{"format":"pt"}}')
ENDLESS_HEADER = (1 << 60).to_bytes(8, "little") + b"{}"


def many(names: list[str], shape: list[int] | None = None) -> Callable[[Path], object]:
    """A weights file of tensors without a byte, which costs an attacker only a header."""
    entry = {"dtype": "F32", "shape": shape or [8, 0], "data_offsets": [0, 0]}
    return raw_weights(header(json.dumps(dict.fromkeys(names, entry), separators=(",", ":"))))


def modules(count: int, stem: str = "base_model.model.m") -> list[str]:
    return [f"{stem}{number}.q_proj.lora_A.weight" for number in range(count)]


def alternatives(count: int) -> str:
    return "|".join(f"a{number}" for number in range(count))


def with_identity(**body: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "identity.json").write_text(json.dumps(body))


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [spoil(folder) for spoil in spoils]


def added(name: str, value: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: save_file(load_file(folder / WEIGHTS) | {name: value}, folder / WEIGHTS)


def base_embeddings_only(folder: Path) -> None:
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({name: np.ones((512, 64), np.float32)}, folder / WEIGHTS)


# What an attacker would write to keep us busy: the test holds each to a bound.
MOST = 8_000  # modules of a file that is gone through to its end; several times as many are taken
LONGEST = "base_model.model." + "a." * 26
ENDLESS_LISTS = header('{"a":[' + "[]," * 4_000_000 + "1]}")
ENDLESS_NUMBERS = header('{"a":[' + "1," * 8_000_000 + "1]}")
WORK = [
    BadAdapter("W1", "a name of 20,000 dots", many(["a" + ".a" * 20_000]), "weights_corrupt", True),
    BadAdapter("W1", "names of 32 parts", many(modules(MOST, LONGEST)), "module_unknown"),
    BadAdapter(
        "W2",
        "long layers_pattern",
        config(layers_to_transform=[0], layers_pattern=[f"a{n}" for n in range(90_000)]),
        "pattern_unsupported",
        True,
    ),
    BadAdapter(
        "W2",
        "layers_to_transform, target_modules and exclude_modules without end",
        both(
            config(
                layers_to_transform=[*range(1000, 30_000)],
                layers_pattern=["a", "b", "c", "layers"],
                target_modules=[f"a{n}" for n in range(30_000)] + ["q_proj"],
                exclude_modules=[f"a{n}" for n in range(30_000)],
            ),
            many(modules(MOST, "base_model.model.layers.")),
        ),
        "target_modules_mismatch",
    ),
    BadAdapter(
        "W3",
        "a key of 140,000 names",
        config(rank_pattern={alternatives(140_000): 8}),
        "pattern_unsupported",
        True,
    ),
    BadAdapter(
        "W3",
        "keys of 40,000 names",
        both(
            config(rank_pattern={alternatives(40_000): 8}, alpha_pattern={alternatives(40_000): 8}),
            many(modules(MOST)),
        ),
        "module_unknown",
    ),
    BadAdapter("W3", "70,000 settings", config(**{f"a{n}": 1 for n in range(70_000)}), "config_invalid"),
    BadAdapter(
        "W4",
        "digests of 15,000 files",
        with_identity(files={f"f{n}": "0" * 50 for n in range(15_000)}),
        "chat_settings_invalid",
    ),
    BadAdapter("W4", "identity.json of 16 MiB", with_identity(a="a" * (16 << 20)), "too_large", True),
    BadAdapter("W5", "150,000 tensors", many([f"a{n}" for n in range(150_000)]), "too_large", True),
    BadAdapter("W5", "a header of brackets", raw_weights(ENDLESS_LISTS), "too_large", True),
    BadAdapter("W5", "a header of numbers", raw_weights(ENDLESS_NUMBERS), "too_large", True),
    BadAdapter(
        "W6",
        "90,000 heads",
        both(config(modules_to_save=[f"a{n}" for n in range(90_000)]), many(modules(MOST))),
        "feature_unsupported",
    ),
    BadAdapter(
        "W7",
        "an expression of a millisecond a module",
        both(config(target_modules="(a|a){6}(.|.){3}.*x|.*"), many(modules(MOST))),
        "module_unknown",
    ),
]  # fmt: skip

BAD_ADAPTERS = [
    BadAdapter("A1", "folder gone", lambda folder: shutil.rmtree(folder), "adapter_missing", True),
    BadAdapter("A2", "no config", lambda folder: (folder / CONFIG).unlink(), "config_missing", True),
    BadAdapter("A3", "empty config", raw_config(b""), "config_not_json", True),
    BadAdapter("A3", "config cut in half", raw_config(b'{"r": 8, "lora_al'), "config_not_json", True),
    BadAdapter("A3", "config not UTF-8", raw_config(b'{"r": "\xff\xfe"}'), "config_not_json", True),
    BadAdapter("A4", "config is a list", raw_config(b"[]"), "config_not_object", True),
    BadAdapter("A4", "config is a number", raw_config(b"8"), "config_not_object", True),
    BadAdapter("A5", "nested 100,000 deep", raw_config(b"[" * 100_000), "config_not_json", True),
    BadAdapter("A5", "nested 200 deep", raw_config(DEEP), "config_not_json", True),
    BadAdapter("A5", "a number of 5,000 digits", raw_config(LONG_NUMBER), "config_not_json", True),
    BadAdapter("A6", "a key twice", raw_config(b'{"r": 8, "r": 16}'), "config_duplicate_key", True),
    BadAdapter("A7", "NaN", raw_config(b'{"lora_alpha": NaN}'), "config_not_finite", True),
    BadAdapter("A7", "Infinity", raw_config(b'{"lora_alpha": -Infinity}'), "config_not_finite", True),
    BadAdapter("A8", "config over 1 MiB", raw_config(b" " * (1 << 20) + b"{} "), "config_too_large", True),
    *(
        BadAdapter("A9", f"peft_type {kind}", config(peft_type=kind), "peft_type_unsupported")
        for kind in ("IA3", "LOHA", "VERA", "ADALORA", ..., 3)
    ),
    *(
        BadAdapter("A10", f"r {str(rank)[:12]}", config(r=rank), "rank_invalid")
        for rank in (..., None, 0, -1, True, 8.5, "8", 10**9, [], {})
    ),
    BadAdapter("A11", "rank above the engine's", config(r=1024), "rank_too_large"),
    *(
        BadAdapter("A12", f"alpha {str(alpha)[:12]}", config(lora_alpha=alpha), "alpha_invalid")
        for alpha in (..., None, 1e308, 10**400, "16", True, {}, -1, -0.5)
    ),
    BadAdapter("A13", "alpha 0", config(lora_alpha=0), "alpha_no_effect"),
    BadAdapter("A13", "alpha_pattern 0", config(alpha_pattern={"q_proj": 0}), "alpha_no_effect"),
    BadAdapter("A14", "r differs from the tensors", config(r=4), "rank_mismatch"),
    BadAdapter("A14", "rank_pattern differs", config(rank_pattern={"q_proj": 4}), "rank_mismatch"),
    *(
        BadAdapter("A15", next(iter(change)), config(**change), "feature_unsupported")
        for change in (
            {"use_dora": True},
            {"lora_bias": True},
            {"bias": "all"},
            {"bias": 3},
            {"alora_invocation_tokens": [1, 2]},
            {"layer_replication": [[0, 1]]},
            {"use_bdlora": {"nblocks": 2}},
            {"use_qalora": True},
        )
    ),
    *(
        BadAdapter("A16", f"init {init}", config(init_lora_weights=init), "init_unsupported")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "nonsense")
    ),
    BadAdapter("A17", "modules_to_save", config(modules_to_save=["lm_head"]), "feature_unsupported"),
    BadAdapter("A18", "hostile rank_pattern", config(rank_pattern={HOSTILE: 8}), "pattern_unsupported", True),
    BadAdapter("A18", "alpha_pattern", config(alpha_pattern={HOSTILE: 8}), "pattern_unsupported", True),
    BadAdapter("A18", "hostile target_modules", config(target_modules=HOSTILE), None),
    BadAdapter("A19", "invalid expression", config(rank_pattern={"(": 8}), "pattern_unsupported", True),
    BadAdapter("A19", "rank_pattern a list", config(rank_pattern=[8]), "pattern_unsupported", True),
    BadAdapter(
        "A20",
        "another base by fingerprint",
        lambda folder: (folder / "identity.json").write_text(
            json.dumps({"provenance": {"base_model": {"name": "org/other", "fingerprint": "0" * 16}}})
        ),
        "base_mismatch",
    ),
    BadAdapter("A21", "the base by another name", config(base_model_name_or_path="/data/x/base"), None),
    BadAdapter("A22", "smaller hidden size", tensors(A=NARROW), "shape_mismatch"),
    BadAdapter("A23", "larger hidden size", tensors(A=WIDE), "shape_mismatch"),
    BadAdapter(
        "A24",
        "more layers than the base",
        every_tensor(lambda name, value: (name.replace("layers.1.", "layers.7."), value)),
        "module_unknown",
    ),
    BadAdapter(
        "A24",
        "fewer layers than the base",
        every_tensor(lambda name, value: None if "layers.1." in name else (name, value)),
        None,
    ),
    BadAdapter(
        "A25",
        "unknown modules",
        every_tensor(lambda name, value: (name.replace("q_proj", "query_key_value"), value)),
        "module_unknown",
    ),
    BadAdapter(
        "A25",
        "no tensor matches",
        every_tensor(lambda name, value: (name.replace("model.layers", "transformer.h"), value)),
        "module_unknown",
    ),
    BadAdapter("A26", "A without B", tensors(B=None), "pair_incomplete"),
    BadAdapter("A26", "B without A", tensors(A=None), "pair_incomplete"),
    BadAdapter("A27", "no tensor", raw_weights(header("{}")), "adapter_empty", True),
    BadAdapter("A27", "metadata only", raw_weights(METADATA_ONLY), "adapter_empty", True),
    BadAdapter("A28", "all of B is zero", every_tensor(scaled), None),
    BadAdapter("A29", "NaN", first_value(float("nan")), "weights_not_finite"),
    BadAdapter("A29", "infinity", first_value(float("-inf")), "weights_not_finite"),
    BadAdapter("A30", "1e38", first_value(1e38), "weights_out_of_range"),
    BadAdapter("A30", "-70000", first_value(-70000.0), "weights_out_of_range"),
    *(
        BadAdapter("A31", str(np.dtype(kind)), tensors(A=np.ones((8, 64), kind)), "dtype_unsupported", True)
        for kind in (np.int8, np.int64, np.bool_, np.uint16)
    ),
    BadAdapter("A27", "a copy of the base's embeddings only", base_embeddings_only, "adapter_empty", True),
    BadAdapter("A32", "1-D", tensors(A=np.zeros(8, np.float32)), "shape_mismatch"),
    BadAdapter("A32", "3-D", tensors(A=np.zeros((1, 8, 64), np.float32)), "shape_mismatch"),
    BadAdapter("A32", "0-size", tensors(A=np.zeros((0, 64), np.float32)), "shape_mismatch"),
    BadAdapter("A32", "broadcastable", tensors(B=np.zeros((8, 1), np.float32)), "shape_mismatch"),
    BadAdapter("A33", "0 bytes", raw_weights(b""), "weights_corrupt", True),
    BadAdapter("A33", "truncated", truncated, "weights_corrupt", True),
    BadAdapter("A33", "header of 2^60", raw_weights(ENDLESS_HEADER), "weights_corrupt", True),
    BadAdapter("A33", "header no JSON", raw_weights(header("{nonsense")), "weights_corrupt", True),
    BadAdapter("A33", "header nested", raw_weights(header('{"a":' * 100_000)), "weights_corrupt", True),
    BadAdapter(
        "A33",
        "overlap",
        raw_weights(header("{" + entry("a", 0, 8) + "," + entry("b", 4, 12) + "}", b"\0" * 12)),
        "weights_corrupt",
        True,
    ),
    BadAdapter(
        "A33",
        "hole",
        raw_weights(header("{" + entry("a", 0, 8) + "," + entry("b", 12, 20) + "}", b"\0" * 20)),
        "weights_corrupt",
        True,
    ),
    BadAdapter(
        "A33",
        "shape that overflows",
        raw_weights(header("{" + entry("a", 0, 8, "[4611686018427387904,4]") + "}", b"\0" * 8)),
        "weights_corrupt",
        True,
    ),
    BadAdapter("A34", "trailing bytes", appended(b"\0" * 16), "weights_corrupt", True),
    BadAdapter("A34", "zip behind it", appended(b"PK\x05\x06" + b"\0" * 18), "weights_corrupt", True),
    BadAdapter("A35", "a tensor twice", duplicated_tensor, "weights_duplicate_key", True),
    *(
        BadAdapter("A36", f"{what} as {name}", instead(name, make), "not_regular_file", True)
        for name in (WEIGHTS, CONFIG)
        for what, make in (
            ("folder", Path.mkdir),
            ("FIFO", os.mkfifo),
            ("socket", unix_socket),
            ("device", lambda path: path.symlink_to("/dev/zero")),
        )
    ),
    *(
        BadAdapter("A37", f"{what} to {name}", moved_and_linked(name, link), "link_refused", True, True)
        for name in (WEIGHTS, CONFIG)
        for what, link in (
            ("symbolic link", lambda path, target: path.symlink_to(target)),
            ("hard link", lambda path, target: os.link(target, path)),
        )
    ),
    BadAdapter("A38", "only a pickle", pickled("adapter_model.bin"), "pickle_refused", True),
    BadAdapter("A38", "only a .pt pickle", pickled("adapter_model.pt"), "pickle_refused", True),
    BadAdapter("A39", "sparse 1 TB", sparse, "too_large", True),
    BadAdapter("A39", "a crowd of files", crowded, "too_many_files", True),
    BadAdapter("A41", "new tokens", config(trainable_token_indices=[1]), "vocab_unsupported"),
    BadAdapter(
        "A41",
        "resized embeddings",
        lambda folder: save_file(
            load_file(folder / WEIGHTS) | {"base_model.model.model.embed_tokens.weight": NEW_EMBEDDINGS},
            folder / WEIGHTS,
        ),
        "vocab_unsupported",
    ),
    BadAdapter("A41", "a head", config(modules_to_save=["score"]), None),
    BadAdapter(
        "A41",
        "a head on a model that is no classifier",
        both(config(modules_to_save=["score"]), added("base_model.model.score.weight", NARROW[:2])),
        "feature_unsupported",
    ),
    BadAdapter(
        "A41",
        "a linear layer's matrix as an embedding's",
        every_tensor(lambda name, value: (name.replace("lora_A.weight", "lora_embedding_A"), value)),
        "module_unknown",
    ),
    *WORK,
    BadAdapter("A42", "digest differs", with_checksum, "checksum_mismatch"),
    BadAdapter("T", "template over 64 KiB", template("x" * 70_000), "template_refused", True),
    BadAdapter(
        "T",
        "template loops for ever",
        template("{% for a in range(1000) %}{% for b in range(1000) %}{% for c in range(1000) %}"
                 "{% for d in range(1000) %}x{% endfor %}{% endfor %}{% endfor %}{% endfor %}"),
        "template_refused",
        True,
    ),
    BadAdapter("T", "template is no Jinja", template("{% for %}"), "template_refused", True),
]  # fmt: skip
