"""Adapters that are nearly right: a good one, with a few things in it replaced by anything."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

SHAPES = {  # module -> (out_features, in_features) of the base in test_admission.py
    "self_attn.q_proj": (32, 16),
    "self_attn.v_proj": (16, 16),
    "mlp.down_proj": (16, 24),
}
RANK = 2
GOOD_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "r": RANK,
    "lora_alpha": 4,
    "bias": "none",
    "target_modules": [name.rpartition(".")[2] for name in SHAPES],
    "rank_pattern": {},
    "alpha_pattern": {},
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "target_parameters": None,
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["q_proj", "v_proj", "down_proj", "layers", "all-linear", ".*_proj", "(", "gaussian", "eva"]
    ),
    st.sampled_from(
        ["orthogonal", "olora", "pissa", "loftq", "mica", "lora_ga", "LORA", "CAUSAL_LM", "SEQ_CLS"]
    ),
    st.sampled_from(["score", "classifier", "lm_head", "embed_tokens", "self_attn", "model.layers.1.mlp"]),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    ["q_proj", "v_proj", "down_proj", "layers.0.self_attn.q_proj", "^model.layers.1", "a|b", "("]
)
patterns = st.dictionaries(
    names | st.text(max_size=6), st.integers(-1, 4) | st.floats() | scalars, max_size=3
)
KEYS = [*GOOD_CONFIG, "use_dora", "lora_bias", "eva_config", "loftq_config", "corda_config", "revision"]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A good config with up to four keys changed, removed or added."""
    config = dict(GOOD_CONFIG)
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(KEYS) | st.text(max_size=12))
        if draw(st.integers(0, 5)) == 0:
            config.pop(key, None)
        else:
            config[key] = draw(patterns if key.endswith("_pattern") else anything)
    return config


def good_tensors(ranks: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """A and B of every module in two layers; `ranks` by the modules' last names."""
    chance = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for module, (out_features, in_features) in SHAPES.items():
            rank = (ranks or {}).get(module.rpartition(".")[2], RANK)
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = chance.normal(size=(rank, in_features)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = chance.normal(size=(out_features, rank)).astype(np.float32)
    return tensors


def _renamed(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    old, new = draw(
        st.sampled_from(
            [
                ("base_model.model.", ""),
                ("model.layers.1", "model.layers.9"),
                ("q_proj", "k_proj"),
                ("lora_A.weight", "lora_A.default.weight"),
                ("lora_B.weight", "lora_embedding_B"),
                (".weight", ".bias"),
                ("self_attn", "attn"),
                ("lora_A", "lora_B"),
            ]
        )
    )
    tensors[name.replace(old, new)] = tensors.pop(name)


def _reshaped(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 16, 24, 32]), max_size=3))
    tensors[name] = np.ones(shape, np.float32)


def _recast(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from([np.float16, np.float64, np.int8, np.bool_, np.uint32]))
    tensors[name] = tensors[name].astype(kind)


def _spoiled(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    value = draw(st.floats(width=32) | st.sampled_from([0.0, 1e5, -1e30]))
    tensors[name] = np.full_like(tensors[name], value if tensors[name].dtype.kind == "f" else 1)


def _removed(draw: st.DrawFn, tensors: dict[str, np.ndarray]) -> None:
    tensors.pop(draw(st.sampled_from(sorted(tensors))))


_CHANGES: list[Callable[[st.DrawFn, dict[str, np.ndarray]], None]] = [
    _renamed,
    _reshaped,
    _recast,
    _spoiled,
    _removed,
]


@st.composite
def weights(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Good tensors, sometimes of other ranks, with up to two things wrong."""
    ranks = {"q_proj": draw(st.integers(1, 4))} if draw(st.booleans()) else {}
    tensors = good_tensors(ranks)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        draw(st.sampled_from(_CHANGES))(draw, tensors)
    return tensors


entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "F8_E4M3", "X"]) | anything,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | anything,
        "data_offsets": st.tuples(st.integers(-1, 64), st.integers(-1, 64)).map(list) | anything,
    }
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | anything, max_size=4)


@st.composite
def weight_files(draw: st.DrawFn) -> bytes:
    """Bytes of a weights file: a header that is nearly one, with data behind it; or anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    text = draw(headers.map(lambda header: json.dumps(header).encode()) | st.binary(max_size=60))
    length = draw(st.just(len(text)) | st.integers(0, (1 << 64) - 1))
    return struct.pack("<Q", length) + text + draw(st.binary(max_size=80))


@st.composite
def whole_files(draw: st.DrawFn) -> bytes:
    """A whole weights file of a few tensors, with at most one byte of it changed."""
    header, position = {}, 0
    for index in range(draw(st.integers(0, 3))):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[f"t{index}"] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    data = bytearray(struct.pack("<Q", len(text)) + text + bytes(position))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    return bytes(data)
