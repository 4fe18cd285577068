"""Chat settings that somebody states for an adapter, over what its folder says."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.base_tokens import end_and_begin
from vllm_lora_ext.chat_template import MAX_TEMPLATE_BYTES
from vllm_lora_ext.contract import ChatSettings, stop_problem, system_prompt_problem
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.prompt_text import text_template
from vllm_lora_ext.strict_json import canonical

_ITEM = "chat settings"


@dataclass(frozen=True)
class ChatOverride:
    """What somebody states for an adapter over what its folder says; None leaves that as it is.

    `template` is Jinja, `prompt_text` a text form with `{instruction}`, which becomes a template with the
    base's end token. An empty `system_prompt` or `stop` means none.

    Raises:
        BadSetting: a value is none of its kind, or too large.
    """

    template: str | None = None
    prompt_text: str | None = None
    system_prompt: str | None = None
    stop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if rule := self._problem():
            raise BadSetting(_ITEM, rule, "Change it.")
        if self.prompt_text is not None:
            text_template(self.prompt_text, "")

    def _problem(self) -> str | None:
        for name in ("template", "prompt_text"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_TEMPLATE_BYTES):
                return f"{name} must be a text of at most {MAX_TEMPLATE_BYTES} characters"
        if self.template is not None and self.prompt_text is not None:
            return "template and prompt_text say the same thing twice"
        if self.system_prompt is not None and (rule := system_prompt_problem(self.system_prompt)):
            return rule
        if self.stop is not None and (rule := stop_problem(self.stop)):
            return rule
        try:
            canonical(self.to_json())
        except UnicodeEncodeError as error:
            return f"hold a text that is no Unicode ({error.reason})"
        return None

    def apply(self, chat: ChatSettings, base: BaseModel | None) -> ChatSettings:
        """`chat` with what is stated. A stated template counts as trained: a person vouches for it.

        Raises:
            BadSetting: the base's end token, which `prompt_text` needs, cannot be had.
        """
        template = self.template
        if self.prompt_text is not None:
            template = text_template(self.prompt_text, *end_and_begin(base))[0]
        if template is not None:
            chat = dataclasses.replace(chat, template=template, trained=True)
        if self.system_prompt is not None:
            chat = dataclasses.replace(chat, system_prompt=self.system_prompt or None)
        if self.stop is not None:
            chat = dataclasses.replace(chat, stop=self.stop)
        return chat

    @property
    def digest(self) -> str:
        """Equal for equal statements; empty when nothing is stated."""
        body = self.to_json()
        return hashlib.sha256(canonical(body)).hexdigest() if body else ""

    def to_json(self) -> dict[str, Any]:
        """What is stated, as JSON values."""
        stop = None if self.stop is None else list(self.stop)
        body = {**dataclasses.asdict(self), "stop": stop}
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def from_json(cls, body: object) -> ChatOverride:
        """The inverse of `to_json`, for what comes from somebody else.

        Raises:
            BadSetting: it is no object, has a key that is none of ours, or a value as above.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(body, dict) or not set(body) <= known:
            rule = f"must be a JSON object with no other keys than {', '.join(sorted(known))}"
            raise BadSetting(_ITEM, rule, "Change it.")
        stop = body.get("stop")
        return cls(**{**body, "stop": tuple(stop) if isinstance(stop, list) else stop})


AS_IT_IS = ChatOverride()  # nothing is stated
