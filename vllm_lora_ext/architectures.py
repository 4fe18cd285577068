"""What a model's `config.json` says about its linear modules: names, shapes, and which we do not judge.

Pure functions over the config, without torch or transformers. Numbers come from the config and never
from stored weights, so a quantised model looks like the one that it was made from. A config that makes
no sense, or an architecture that is not listed, gives None. That the tables agree with transformers is
held by tests/unit/vllm_lora_ext/test_architectures.py, which builds every model listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

Shape = tuple[int, int]  # (out_features, in_features)

_MAX_SIZE, _MAX_LAYERS = 1 << 24, 1024  # a damaged number must not become a list without end

# Module of a layer -> its (output, input), as names of widths.
_Modules = Mapping[str, tuple[str, str]]
_ATTENTION: _Modules = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
}
_DOWN: _Modules = {"mlp.down_proj": ("hidden", "mlp")}
_UP_DOWN: _Modules = {"mlp.up_proj": ("mlp", "hidden"), **_DOWN}
_FUSED_MLP: _Modules = {"mlp.gate_up_proj": ("two mlp", "hidden"), **_DOWN}
_LLAMA: _Modules = {**_ATTENTION, "mlp.gate_proj": ("mlp", "hidden"), **_UP_DOWN}
_GLM: _Modules = {**_ATTENTION, **_FUSED_MLP}
_PLAIN: _Modules = {**_ATTENTION, **_UP_DOWN}
_PHI3: _Modules = {
    "self_attn.qkv_proj": ("query and keys", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    **_FUSED_MLP,
}
_STARCODER2: _Modules = {**_ATTENTION, "mlp.c_fc": ("mlp", "hidden"), "mlp.c_proj": ("hidden", "mlp")}
_PHI: _Modules = {
    **{name: widths for name, widths in _ATTENTION.items() if name != "self_attn.o_proj"},
    "self_attn.dense": ("hidden", "query"),
    "mlp.fc1": ("mlp", "hidden"),
    "mlp.fc2": ("hidden", "mlp"),
}
# Where experts, their routers and what they share stand, in transformers and in vLLM.
_EXPERT_BLOCKS = ("mlp", "block_sparse_moe", "shared_mlp")


class Decoder(NamedTuple):
    """A language model of this architecture: its modules, and what transformers takes for absent numbers.

    None for `kv_heads` is as many as heads, None for `head_dim` is hidden_size / heads.
    """

    modules: _Modules
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    experts: int | None = None  # in layers of a mixture, where the config does not say
    has_dense_layers: bool = False  # a mixture whose config says which layers are ordinary
    is_head_dim_derived: bool = False  # the config's head_dim is not looked at
    vocab: int | None = None  # where a config inside another leaves it out


DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "mistral": Decoder(_LLAMA, 4096, 14336, 32, 32, 8),
    "ministral": Decoder(_LLAMA, 4096, 14336, 32, 32, 8),
    "ministral3": Decoder(_LLAMA, 4096, 14336, 34, 32, 8, 128),
    "qwen2": Decoder(_LLAMA, 4096, 22016, 32, 32, 32),
    "qwen3": Decoder(_LLAMA, 4096, 22016, 32, 32, 32, 128),
    "gemma": Decoder(_LLAMA, 3072, 24576, 28, 16, 16, 256),
    "gemma2": Decoder(_LLAMA, 2304, 9216, 26, 8, 4, 256),
    "gemma3_text": Decoder(_LLAMA, 2304, 9216, 26, 8, 4, 256, vocab=262_208),
    "smollm3": Decoder(_LLAMA, 2048, 11008, 36, 16, 4),
    "granite": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "olmo": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "olmo2": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "olmo3": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "cohere": Decoder(_LLAMA, 8192, 22528, 40, 64),
    "cohere2": Decoder(_LLAMA, 8192, 22528, 40, 64),
    "exaone4": Decoder(_LLAMA, 4096, 16384, 32, 32, 32),
    "ernie4_5": Decoder(_LLAMA, 1024, 3072, 18, 16, 2, 128),
    "seed_oss": Decoder(_LLAMA, 4096, 27648, 64, 80, 8, 128),
    "hunyuan_v1_dense": Decoder(_LLAMA, 4096, 11008, 32, 32),
    "phi3": Decoder(_PHI3, 3072, 8192, 32, 32),
    "phi": Decoder(_PHI, 2048, 8192, 24, 32),
    "glm": Decoder(_GLM, 4096, 13696, 40, 32, 2, 128),
    "glm4": Decoder(_GLM, 4096, 13696, 40, 32, 2, 128),
    "arcee": Decoder(_PLAIN, 2560, 18432, 32, 32),
    "apertus": Decoder(_PLAIN, 4096, 14336, 32, 32),
    "nemotron": Decoder(_PLAIN, 6144, 24576, 32, 48),
    "starcoder2": Decoder(_STARCODER2, 3072, 12288, 30, 24, 2),
    "qwen2_moe": Decoder(_LLAMA, 2048, 5632, 24, 16, 16, None, 60, has_dense_layers=True),
    "qwen3_moe": Decoder(_LLAMA, 2048, 6144, 24, 32, 4, None, 128, has_dense_layers=True),
    "mixtral": Decoder(_ATTENTION, 4096, 14336, 32, 32, 8, experts=8),
    "olmoe": Decoder(_ATTENTION, 2048, 2048, 16, 16, experts=64),
    "granitemoe": Decoder(_ATTENTION, 4096, 11008, 32, 32, experts=8),
    "phimoe": Decoder(_ATTENTION, 4096, 6400, 32, 32, 8, experts=16),
    "ernie4_5_moe": Decoder(_ATTENTION, 2560, 12288, 28, 20, 4, experts=64),
    "glm4_moe": Decoder(_ATTENTION, 4096, 10944, 46, 96, 8, experts=128),
    "gpt_oss": Decoder(_ATTENTION, 2880, 2880, 36, 64, 8, 64, 128),
    "minimax_m2": Decoder(_ATTENTION, 3072, 1536, 62, 48, 8, 128, 256),
}
# Language models that stand inside a vision-language model only.
INNER_DECODERS: Mapping[str, Decoder] = {
    "qwen2_vl_text": Decoder(_LLAMA, 8192, 29568, 80, 64, 8, is_head_dim_derived=True),
    "qwen2_5_vl_text": Decoder(_LLAMA, 8192, 29568, 80, 64, 8, is_head_dim_derived=True),
    "qwen3_vl_text": Decoder(_LLAMA, 4096, 22016, 32, 32, 32, 128),
    "qwen3_vl_moe_text": Decoder(_LLAMA, 2048, 5632, 24, 16, 16, None, 60, has_dense_layers=True),
    "glm4v_text": Decoder(_GLM, 4096, 13696, 40, 32, 2, is_head_dim_derived=True),
}


class Wrapper(NamedTuple):
    """A vision-language model around a decoder.

    `stems` are the names under which adapters call the decoder and vLLM finds it (`hf_to_vllm_mapper` of
    vLLM's class): a name that vLLM does not map would be served as if there were no adapter.
    """

    decoder: str  # when `text_config` names none
    stems: tuple[str, ...]
    others: tuple[str, ...]  # vision tower and projector
    takes_any_decoder: bool = False
    may_be_flat: bool = False  # older configs have the decoder's numbers at the top


_STEMS = ("model.language_model", "language_model.model")
_QWEN = ("model.visual", "visual")
_TOWER = (
    *("model.vision_tower", "vision_tower"),
    *("model.multi_modal_projector", "multi_modal_projector"),
)
_IDEFICS = (("model.text_model",), ("model.vision_model", "model.connector"))
WRAPPERS: Mapping[str, Wrapper] = {
    "qwen2_vl": Wrapper("qwen2_vl_text", (*_STEMS, "model"), _QWEN, may_be_flat=True),
    "qwen2_5_vl": Wrapper("qwen2_5_vl_text", (*_STEMS, "model"), _QWEN, may_be_flat=True),
    "qwen3_vl": Wrapper("qwen3_vl_text", _STEMS, _QWEN),
    "qwen3_vl_moe": Wrapper("qwen3_vl_moe_text", _STEMS, _QWEN),
    "glm4v": Wrapper("glm4v_text", _STEMS, _QWEN),
    "gemma3": Wrapper("gemma3_text", _STEMS, _TOWER),
    "llava": Wrapper("llama", _STEMS, _TOWER, takes_any_decoder=True),
    "llava_next": Wrapper("llama", _STEMS, _TOWER, takes_any_decoder=True),
    "paligemma": Wrapper("gemma", _STEMS, _TOWER, takes_any_decoder=True),
    "mistral3": Wrapper("mistral", (*_STEMS, "model"), _TOWER, takes_any_decoder=True),
    "internvl": Wrapper("qwen2", _STEMS, _TOWER, takes_any_decoder=True),
    "idefics3": Wrapper("llama", *_IDEFICS, takes_any_decoder=True),
    "smolvlm": Wrapper("llama", *_IDEFICS, takes_any_decoder=True),
}


@dataclass(frozen=True)
class Architecture:
    """The modules of one model.

    `shapes` are those that we judge. Embedding and head stand apart: some of vLLM's classes take LoRA on
    them. `blocks` are parts of the model whose modules we do not judge at all.
    """

    shapes: Mapping[str, Shape]
    vocabulary_names: frozenset[str]
    vocabulary: Shape | None  # (vocab_size, hidden_size)
    blocks: frozenset[str]
    numbers: Mapping[
        str, Any
    ]  # the config's, with what it leaves out: two configs of one model agree in them

    def is_unjudged(self, module: str) -> bool:
        """Whether the model has this module, or may have it, and we do not claim to know its shape."""
        if module in self.shapes:
            return False
        if module in self.vocabulary_names or module in self.blocks:
            return True
        end = module.find(".")
        while end > 0:
            if module[:end] in self.blocks:
                return True
            end = module.find(".", end + 1)
        return False


class _Unclear(ValueError):
    """A number is absent or makes no sense."""


def describe(config: Mapping[str, Any]) -> Architecture | None:
    """The modules of the model with this `config.json`; None if they cannot be told."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or config.get("per_layer_config"):  # layers that differ
        return None
    with suppress(_Unclear):
        if model_type in DECODERS:
            return _describe(DECODERS[model_type], config, ("model",))
        if model_type in WRAPPERS:
            return _describe_wrapped(WRAPPERS[model_type], config)
    return None


def _describe_wrapped(wrapper: Wrapper, config: Mapping[str, Any]) -> Architecture:
    text = config.get("text_config")
    if text is None and wrapper.may_be_flat:
        flat = _describe(INNER_DECODERS[wrapper.decoder], config, wrapper.stems, wrapper.others)
        return replace(flat, numbers={**flat.numbers, "decoder": wrapper.decoder})
    if not isinstance(text, Mapping) or text.get("per_layer_config"):
        raise _Unclear("text_config")
    name = text.get("model_type", wrapper.decoder) if wrapper.takes_any_decoder else wrapper.decoder
    decoder = _inner_decoder(wrapper, name)
    # Such configs leave out what transformers takes anyway; a model of its own states its sizes.
    sizes = {
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.mlp,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
    }
    if decoder.vocab:
        sizes["vocab_size"] = decoder.vocab
    nested = _describe(decoder, {**sizes, **text}, wrapper.stems, wrapper.others)
    return replace(nested, numbers={**nested.numbers, "decoder": name})


def _inner_decoder(wrapper: Wrapper, name: Any) -> Decoder:
    if not wrapper.takes_any_decoder:
        return INNER_DECODERS.get(wrapper.decoder) or DECODERS[wrapper.decoder]
    if not isinstance(name, str) or name not in DECODERS:
        raise _Unclear("model_type")
    return DECODERS[name]


def _describe(
    decoder: Decoder, config: Mapping[str, Any], stems: tuple[str, ...], others: tuple[str, ...] = ()
) -> Architecture:
    numbers = _numbers(decoder, config)
    widths, layers = _widths(numbers), numbers["num_hidden_layers"]
    mixtures = _mixture_layers(decoder, config, layers)
    shapes = {
        f"{stem}.layers.{layer}.{module}": (widths[to_width], widths[from_width])
        for stem in stems
        for layer in range(layers)
        for module, (to_width, from_width) in decoder.modules.items()
        if layer not in mixtures or module.startswith("self_attn.")
    }
    experts = [
        f"{stem}.layers.{layer}.{block}" for stem in stems for layer in mixtures for block in _EXPERT_BLOCKS
    ]
    heads = {stem.removesuffix("model") + "lm_head" for stem in stems if stem.endswith(".model")}
    names = frozenset({f"{stem}.embed_tokens" for stem in stems} | heads | {"lm_head"})
    vocabulary = None
    with suppress(_Unclear):
        vocabulary = _whole(config, "vocab_size"), widths["hidden"]
    return Architecture(shapes, names, vocabulary, frozenset([*experts, *others]), numbers)


def _numbers(decoder: Decoder, config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    needs_mlp = any(name.startswith("mlp.") for name in decoder.modules)
    mlp = _whole(config, "intermediate_size") if needs_mlp else config.get("intermediate_size", decoder.mlp)
    kv_heads = _whole_or(config, "num_key_value_heads", decoder.kv_heads, heads)
    head_dim = _whole_or(config, "head_dim", decoder.head_dim, hidden // heads)
    if decoder.is_head_dim_derived and head_dim * heads != hidden:
        raise _Unclear("head_dim")
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": _whole(config, "num_hidden_layers", high=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": config.get("vocab_size"),
    }


def _widths(numbers: Mapping[str, Any]) -> dict[str, int]:
    hidden, head_dim = numbers["hidden_size"], numbers["head_dim"]
    mlp = numbers["intermediate_size"] if type(numbers["intermediate_size"]) is int else 0  # of no module
    heads, kv_heads = numbers["num_attention_heads"], numbers["num_key_value_heads"]
    return {
        "hidden": hidden,
        "mlp": mlp,
        "two mlp": 2 * mlp,
        "query": heads * head_dim,
        "key": kv_heads * head_dim,
        "query and keys": (heads + 2 * kv_heads) * head_dim,
    }


def _mixture_layers(decoder: Decoder, config: Mapping[str, Any], layers: int) -> set[int]:
    """The layers whose MLP block is a mixture, or may be one."""
    if decoder.experts is None:
        return set()
    if not decoder.has_dense_layers:
        return set(range(layers))
    stated = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = _whole(config, stated, decoder.experts, low=0)
    step = _whole(config, "decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise _Unclear("mlp_only_layers")
    return {layer for layer in range(layers) if experts and (layer + 1) % step == 0} - set(dense)


def _whole(
    config: Mapping[str, Any], key: str, default: int | None = None, low: int = 1, high: int = _MAX_SIZE
) -> int:
    value = config.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise _Unclear(key)
    return value


def _whole_or(config: Mapping[str, Any], key: str, default: int | None, derived: int) -> int:
    """A number that may be absent (the architecture's own default) or null (it follows from others)."""
    value = config.get(key, default)
    return _whole({key: derived if value is None else value}, key)
