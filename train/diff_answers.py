"""Two adapters answer the same prompts, with transformers and PEFT: where do they part, and how surely?

Each is asked as its server would ask it: by its own template, system prompt and stop strings. Both answer
greedily and without penalties, so that an answer is one, and every difference is the adapters'.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.model import attach_adapter, first_line, load_base, load_tokenizer, training_dtype
from vllm_lora_ext.admission import NOT_ALLOWABLE
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import AdapterRefused, BadInput, BadSetting
from vllm_lora_ext.inspection import Rules, inspect_adapter
from vllm_lora_ext.spec import Finding, Severity

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

# What PEFT computes and a server cannot serve as a LoRA.
_PEFT_CAN = frozenset(
    (
        *("feature_unsupported", "vocab_unsupported", "init_unsupported", "module_unknown"),
        *("peft_type_unsupported", "rank_too_large"),
    )
)
# The rules for LoRA say nothing of other PEFT types; what harms whoever reads a folder is always refused.
_HARMFUL = NOT_ALLOWABLE - {"adapter_empty", "pattern_unsupported"} - _PEFT_CAN
_PLAIN_INITS = (None, True, False, "gaussian")


@dataclass(frozen=True)
class Speaker:
    """An adapter's folder, how it wants to be asked, and its `adapter_config.json`."""

    folder: Path
    chat: ChatSettings
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Parting:
    """The first token in which two answers differ.

    `position` counts the tokens of the answer before it, which are the same in both; `before` is their text.
    `tokens` and `texts` are what the first and the second adapter says there, None where a stop string
    had ended its answer. `logprobs` are natural logarithms of probabilities: those that the first adapter
    gives to the first and to the second token, then those that the second adapter gives to them.
    """

    position: int
    before: str
    tokens: tuple[int | None, int | None]
    texts: tuple[str | None, str | None]
    logprobs: tuple[tuple[float | None, float | None], tuple[float | None, float | None]]


@dataclass(frozen=True)
class AnswerDifference:
    """What both say to one prompt; `parting` is None if they say the same, token by token.

    `asked_alike` is whether template and system prompt made the same tokens of the prompt for both.
    """

    prompt: str
    first: str
    second: str
    asked_alike: bool
    parting: Parting | None

    @property
    def differs(self) -> bool:
        """Whether a reader sees another answer."""
        return self.first != self.second or self.parting is not None


def compare_answers(
    first: Speaker,
    second: Speaker,
    prompts: Sequence[str],
    base_model: str,
    max_tokens: int = 128,
    allow: Collection[str] = (),
) -> list[AnswerDifference]:
    """Ask both every prompt. Adapters that PEFT can compute need not be ones that a server can serve.

    Raises:
        BadSetting: a prompt is empty, or longer than the base can read.
        AdapterRefused: an adapter does not fit the base, or must not be used.
        BadBaseModel, BadInput: the base or an adapter cannot be loaded, or a template not be rendered.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise BadSetting("--prompt", "has no text", 'Give some, for example --prompt "Who are you?".')
    speakers = first, second
    base = read_base_model(base_model)
    refused = [_judge(speaker, base, allow) for speaker in speakers]
    tokenizer = load_tokenizer(base_model)
    asked = [[_prompt_ids(tokenizer, prompt, speaker.chat) for prompt in prompts] for speaker in speakers]
    pair = _Pair(speakers, base_model, shared=all(map(_is_plain, speakers, refused)))
    _check_lengths(base, asked, max_tokens)
    answers = [
        [_answer(pair.model(side), tokenizer, ids, speaker.chat.stop, max_tokens) for ids in asked[side]]
        for side, speaker in enumerate(speakers)
    ]
    scores: list[dict[int, list[float | None]]] = [{}, {}]
    for side in (1, 0):  # the second is still loaded
        for index, said in enumerate(zip(*answers, strict=True)):
            if (position := _parting(*said)) is not None:
                ids = [*asked[side][index], *said[0][:position]]
                scores[side][index] = _score(pair.model(side), ids, _tokens_at(said, position))
    return [
        _difference(prompt, tokenizer, speakers, [asked[0][index], asked[1][index]], said, scores, index)
        for index, (prompt, said) in enumerate(zip(prompts, zip(*answers, strict=True), strict=True))
    ]


class _Pair:
    """The model with the first or the second adapter, one base in memory at a time.

    Plain LoRAs share a base and are switched. Others may change the base where they are loaded (biases, an
    init that takes its part out of the weights), so each gets a base of its own, read again.
    """

    def __init__(self, speakers: tuple[Speaker, Speaker], base_model: str, shared: bool) -> None:
        self._speakers, self._base_model, self._shared = speakers, base_model, shared
        self._model: Any = None
        self._side = -1

    def model(self, side: int) -> PeftModel:
        """With the adapter of that side at work."""
        if side == self._side:
            return self._model
        if self._shared and self._model is None:
            self._model = self._load(0)
            self._attach_second()
        elif not self._shared:
            self._model = None  # before the next one is read
            self._model = self._load(side)
        if self._shared:
            self._model.set_adapter("second" if side else "default")
        self._side = side
        return self._model

    def _load(self, side: int) -> PeftModel:
        base = load_base(self._base_model, training_dtype("auto"))
        return attach_adapter(base, self._speakers[side].folder).eval()

    def _attach_second(self) -> None:
        folder = self._speakers[1].folder
        try:
            self._model.load_adapter(str(folder), "second")
        except Exception as error:  # as in attach_adapter
            rule = f"PEFT cannot load it ({first_line(error)})"
            raise BadInput(str(folder), rule, "Save it with PEFT again.") from error
        self._model.eval()


def _judge(speaker: Speaker, base: BaseModel, allow: Collection[str]) -> tuple[Finding, ...]:
    """Findings for which a server would refuse the adapter, if PEFT may use it all the same."""
    inspection = inspect_adapter(speaker.folder, Rules(base), name="adapter")  # whatever the folder is called
    refused = tuple(item for item in inspection.findings if item.severity is Severity.REFUSED)
    if speaker.config.get("peft_type") == "LORA":
        allowed = _PEFT_CAN | (frozenset(allow) - NOT_ALLOWABLE)
        blocking = [item for item in refused if item.code not in allowed]
    else:
        blocking = [item for item in refused if item.code in _HARMFUL]
    if blocking:
        raise AdapterRefused(str(speaker.folder), blocking)
    unknown = tuple(item for item in inspection.findings if item.code == "setting_unknown")
    return refused + unknown


def _is_plain(speaker: Speaker, refused: Sequence[Finding]) -> bool:
    is_lora = speaker.config.get("peft_type") == "LORA"
    return is_lora and not refused and speaker.config.get("init_lora_weights") in _PLAIN_INITS


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: ChatSettings) -> list[int]:
    """The prompt as a server asks it: the adapter's template, or the base's, and its system prompt."""
    import jinja2

    if chat.template is None and tokenizer.chat_template is None:
        return list(tokenizer(prompt)["input_ids"])
    system = [{"role": "system", "content": chat.system_prompt}] if chat.system_prompt else []
    try:
        rendered = tokenizer.apply_chat_template(
            [*system, {"role": "user", "content": prompt}],
            chat_template=chat.template,
            add_generation_prompt=True,
            return_dict=True,
        )
    except (jinja2.TemplateError, TypeError) as error:
        rule = f"cannot be rendered ({error})"
        raise BadInput("the chat template", rule, "Repair chat_template.jinja.") from error
    return list(rendered["input_ids"])


def _check_lengths(base: BaseModel, asked: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> None:
    most = base.config.get("max_position_embeddings")
    longest = max((len(ids) for prompts in asked for ids in prompts), default=0)
    if isinstance(most, int) and longest + max_tokens > most:
        rule = f"has {longest} tokens and wants {max_tokens} more, the base reads {most}"
        raise BadSetting("--prompt", rule, "Give a shorter text, or fewer --max-tokens.")


def _answer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str], most: int
) -> list[int]:
    """The tokens of a greedy answer, with its end token if it came to one."""
    import torch

    ends = model.generation_config.eos_token_id if model.generation_config else None
    stated = ends if isinstance(ends, list) else [] if ends is None else [ends]
    stops = {"stop_strings": list(stop), "tokenizer": tokenizer} if stop else {}
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted({*stated, tokenizer.eos_token_id}),
            pad_token_id=tokenizer.eos_token_id,
            **stops,
        )
    # Soft prompts have no ids: some types give back the answer alone.
    answer: list[int] = out[0].tolist()
    return answer[len(ids) :] if answer[: len(ids)] == list(ids) else answer


def _parting(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first place in which two answers are not the same."""
    pairs = enumerate(itertools.zip_longest(first, second))
    return next((index for index, (one, other) in pairs if one != other), None)


def _tokens_at(said: Sequence[Sequence[int]], position: int) -> list[int | None]:
    return [answer[position] if position < len(answer) else None for answer in said]


def _score(model: PeftModel, ids: Sequence[int], tokens: Sequence[int | None]) -> list[float | None]:
    """Natural logarithms of the probabilities that each token comes behind `ids`."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -1].double()
    scores = torch.log_softmax(logits, -1)
    return [None if token is None else float(scores[token]) for token in tokens]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str] = ()) -> str:
    """An answer as a server sends it: up to the first stop string, without special tokens."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return text[: min((found for end in stop if (found := text.find(end)) >= 0), default=len(text))]


def _difference(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    speakers: Sequence[Speaker],
    asked: Sequence[Sequence[int]],
    said: Sequence[Sequence[int]],
    scores: Sequence[Mapping[int, Sequence[float | None]]],
    index: int,
) -> AnswerDifference:
    texts = [
        _text(tokenizer, answer, speaker.chat.stop) for answer, speaker in zip(said, speakers, strict=True)
    ]
    position, parting = _parting(*said), None
    if position is not None:
        tokens = _tokens_at(said, position)
        shown = [None if token is None else str(tokenizer.decode([token])) for token in tokens]
        first, second = (side[index] for side in scores)
        parting = Parting(
            position,
            _text(tokenizer, said[0][:position]),
            (tokens[0], tokens[1]),
            (shown[0], shown[1]),
            ((first[0], first[1]), (second[0], second[1])),
        )
    return AnswerDifference(prompt, texts[0], texts[1], asked[0] == asked[1], parting)
