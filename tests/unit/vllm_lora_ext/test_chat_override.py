"""Chat settings that somebody states: what they do to a folder's, and to what is taken and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.conftest import BASE_CONFIG
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.chat_template import check_template
from vllm_lora_ext.contract import ChatSettings, template_to_use
from vllm_lora_ext.errors import AdapterRefused, BadSetting
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Inspection, Rules
from vllm_lora_ext.intake import Admitted, admit
from vllm_lora_ext.prompt_text import text_template
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import State
from vllm_lora_ext.sources import AdapterSource, find_sources
from vllm_lora_ext.store import AdapterStore
from vllm_lora_ext.template_probe import template_environment

MakeAdapter = Callable[..., Path]
CLASSIC = ChatOverride(prompt_text="Human: {instruction}\\n{input}\\n\\nAssistant: ")
SHORT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
STATED = st.builds(
    ChatOverride,
    template=st.none() | SHORT,
    system_prompt=st.none() | SHORT,
    stop=st.none() | st.lists(SHORT, max_size=3).map(tuple),
)


def base_with(folder: Path, tokenizer: object = None, processor: object = None) -> BaseModel:
    """A base model whose tokenizer states these."""
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if processor is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"post_processor": processor}))
    return BaseModel(str(folder), BASE_CONFIG)


@pytest.fixture
def rules(base_folder: Path) -> Rules:
    return Rules(base_with(base_folder, {"eos_token": "</s>"}))


@given(STATED)
def test_what_is_stated_survives_json(stated: ChatOverride) -> None:
    again = ChatOverride.from_json(json.loads(json.dumps(stated.to_json())))
    assert again == stated and again.digest == stated.digest
    assert bool(stated.digest) == (stated != ChatOverride())


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (None, "JSON object"),
        ([], "JSON object"),
        ({"tempalte": "x"}, "no other keys"),
        ({"template": 1}, "template must be a text"),
        ({"template": ""}, "template must be a text"),
        ({"template": "x" * (64 << 10) + "y"}, "template must be a text of at most"),
        ({"prompt_text": ["{instruction}"]}, "prompt_text must be a text"),
        ({"prompt_text": "Human: "}, "must hold {instruction} once"),
        ({"prompt_text": "{instruction}", "template": "x"}, "twice"),
        ({"system_prompt": 1}, "system_prompt must be"),
        ({"system_prompt": "x" * (1 << 20)}, "system_prompt must be"),
        ({"stop": "###"}, "stop must be a list"),
        ({"stop": [""]}, "stop must be a list"),
        ({"stop": ["x"] * 17}, "stop must be a list"),
        ({"stop": ["x", None]}, "stop must be a list"),
        ({"stop": {"x": 1}}, "stop must be a list"),
        ({"system_prompt": "\ud800"}, "no Unicode"),
        ({"stop": ["\udfff"]}, "no Unicode"),
    ],
)
def test_what_others_state_is_checked(body: object, rule: str) -> None:
    with pytest.raises(BadSetting, match=rule):
        ChatOverride.from_json(body)


def test_only_what_is_stated_changes() -> None:
    chat = ChatSettings("{{ old }}", False, "Be brief.", ("###",), {"temperature": 0.5})
    assert ChatOverride().apply(chat, None) == chat
    stated = ChatOverride(template="{{ new }}").apply(chat, None)
    assert stated == ChatSettings("{{ new }}", True, "Be brief.", ("###",), {"temperature": 0.5})
    assert template_to_use(stated, "{{ the server's }}") == "{{ new }}"
    assert ChatOverride(system_prompt="Hi", stop=("x",)).apply(chat, None).trained is False
    without = ChatOverride(system_prompt="", stop=()).apply(chat, None)
    assert (without.system_prompt, without.stop) == (None, ())


TEMPLATE_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}],
}


@pytest.mark.parametrize(
    ("tokenizer", "processor", "begin"),
    [
        ({"eos_token": "</s>"}, None, ""),
        ({"eos_token": "</s>", "bos_token": "<s>"}, None, ""),
        ({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}, None, "<s>"),
        (
            {"eos_token": {"content": "</s>"}, "bos_token": {"content": "<s>"}, "add_bos_token": True},
            None,
            "<s>",
        ),
        ({"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": False}, TEMPLATE_PROCESSOR, ""),
        ({"eos_token": "</s>", "bos_token": "<s>"}, TEMPLATE_PROCESSOR, "<s>"),
        (
            {"eos_token": "</s>", "bos_token": "<s>"},
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE_PROCESSOR]},
            "<s>",
        ),
        ({"eos_token": "</s>", "bos_token": "<t>"}, TEMPLATE_PROCESSOR, ""),
        ({"eos_token": "</s>", "bos_token": "<s>"}, {"type": "ByteLevel"}, ""),
        ({"eos_token": "</s>", "bos_token": "<s>"}, {"type": "TemplateProcessing", "single": []}, ""),
        ({"eos_token": "</s>", "bos_token": None, "add_bos_token": True}, None, ""),
    ],
)
def test_a_text_form_gets_the_bases_tokens(
    tmp_path: Path, tokenizer: object, processor: object, begin: str
) -> None:
    base = base_with(tmp_path / "a base", tokenizer, processor)
    chat = CLASSIC.apply(ChatSettings(), base)
    assert (chat.template, chat.trained) == (text_template("classic", "</s>", begin)[0], True)


@pytest.mark.parametrize("tokenizer", [None, {}, {"eos_token": None}, {"eos_token": {"lstrip": 1}}, []])
def test_a_base_without_an_end_token_says_so_and_not_where_it_lies(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(BadSetting, match="a base: ") as refused:
        CLASSIC.apply(ChatSettings(), base_with(tmp_path / "a base", tokenizer))
    assert str(tmp_path) not in str(refused.value)


@given(before=SHORT, after=SHORT, end=SHORT)
def test_whatever_a_text_form_holds_is_text(before: str, after: str, end: str) -> None:
    """Also what Jinja gives a meaning of its own."""
    assume(not set("{\\") & {*before, *after})
    template, _ = text_template(f"{before}{{instruction}}{after}", end)
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert check_template(template) == []
    rendered = template_environment().from_string(template).render(messages=chat)
    assert rendered == f"{before}Q".strip() + f"{after}A{end}"


@pytest.mark.parametrize("sign", ["{{", "{%", "%}", "{#", "\\", "'", '"', "\r\n", "\u2028", "{% raw %}"])
def test_a_text_form_may_hold_jinja(sign: str) -> None:
    template, _ = text_template(f"{sign}{{instruction}}{sign}", sign)
    rendered = (
        template_environment().from_string(template).render(messages=[{"role": "user", "content": "Q"}])
    )
    assert rendered == f"{sign}Q".strip() + sign


def test_a_base_of_the_hub_is_asked_for_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_with(tmp_path, {"eos_token": "</s>", "bos_token": "<s>"}, TEMPLATE_PROCESSOR)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tmp_path / name / file))
    (tmp_path / "org").symlink_to(tmp_path)
    (tmp_path / "base").symlink_to(tmp_path)
    chat = CLASSIC.apply(ChatSettings(), BaseModel("org/base", BASE_CONFIG))
    assert chat.template == text_template("classic", "</s>", "<s>")[0]


def test_a_base_of_the_hub_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, file: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {file} in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(BadSetting, match=r"org/gone: tokenizer_config\.json cannot be read"):
        CLASSIC.apply(ChatSettings(), BaseModel("org/gone", BASE_CONFIG))


def test_a_text_form_needs_a_base() -> None:
    with pytest.raises(BadSetting, match="needs the base model"):
        CLASSIC.apply(ChatSettings(), None)


def test_the_tiny_base_renders_what_the_classic_script_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    chat = CLASSIC.apply(ChatSettings(), BaseModel(str(tmp_path), BASE_CONFIG))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], chat_template=chat.template, return_dict=False
    )
    assert ids == tokenizer("Human: Hello\n\nAssistant: ")["input_ids"]


def taken(folder: Path, store: AdapterStore, rules: Rules, chat: ChatOverride) -> Admitted:
    admitted = admit(folder, store, rules, chat=chat)
    admitted.version.release()
    return admitted


def test_the_stored_version_has_what_was_stated(
    make_adapter: MakeAdapter, tmp_path: Path, rules: Rules
) -> None:
    """A checkpoint of the classic script holds the base's own template, though it learned the text form."""
    folder, store = make_adapter(), AdapterStore(tmp_path / "store")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plain = taken(folder, store, rules, ChatOverride())
    stated = ChatOverride(prompt_text="classic", system_prompt="Be brief.", stop=("Human:",))
    other = taken(folder, store, rules, stated)
    chat = store.verify(other.version.digest).chat
    assert chat.template == text_template("classic", "</s>")[0]
    assert (chat.system_prompt, chat.stop) == ("Be brief.", ("Human:",))
    assert (plain.inspection.chat.state, other.inspection.chat.state) == ("unproven", "trained")
    assert plain.version.digest != other.version.digest and plain.source_digest != other.source_digest


def test_a_stated_template_is_judged_and_the_one_that_it_replaces_is_not(
    make_adapter: MakeAdapter, tmp_path: Path, rules: Rules
) -> None:
    folder, store = make_adapter(), AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterRefused, match="template_refused"):
        taken(folder, store, rules, ChatOverride(template="{% for %}"))
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(AdapterRefused, match="template_refused"):
        taken(folder, store, rules, ChatOverride())
    assert taken(folder, store, rules, CLASSIC).inspection.state == "admitted"


def test_what_cannot_be_applied_refuses_and_is_never_dropped(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    rules = Rules(base_with(tmp_path / "bare"), allow=frozenset({"stated_chat_invalid"}))
    with pytest.raises(AdapterRefused, match="stated_chat_invalid"):
        taken(make_adapter(), AdapterStore(tmp_path / "store"), rules, CLASSIC)


def test_publishing_the_same_folder_with_other_settings_is_a_new_version(
    make_adapter: MakeAdapter, tmp_path: Path, rules: Rules
) -> None:
    source = AdapterSource("a", str(make_adapter()))
    with Catalog(tmp_path / "state") as catalog:
        first, _ = publish(source, catalog, rules)
        second, _ = publish(source, catalog, rules, replace=True, chat=CLASSIC)
        assert first.live != second.live
        assert second.live_version.template == "trained"
        assert catalog.rollback("a").digest == first.live


class Folder:
    """One adapters folder that is looked at again and again, with other statements each time."""

    def __init__(self, folder: Path, state_dir: Path, rules: Rules) -> None:
        self.folder, self.catalog, self.rules = folder, Catalog(state_dir), rules
        self.last: Inspection | None = None

    def look(self, **chat: ChatOverride) -> bool:
        """Whether anything had to be taken."""
        inbox = Inbox(self.catalog, self.rules, chat)
        items = inbox.scan(find_sources([str(self.folder)]))
        inbox.take_all(items, lambda _, inspection: setattr(self, "last", inspection))
        return any(item.is_pending for item in items)

    @property
    def live(self) -> str:
        return self.catalog.entry("a").live


@pytest.fixture
def inbox(make_adapter: MakeAdapter, tmp_path: Path, rules: Rules) -> Folder:
    return Folder(make_adapter("a").parent, tmp_path / "state", rules)


def test_a_folder_is_taken_again_when_a_statement_comes_changes_or_goes(inbox: Folder) -> None:
    assert inbox.look() and not inbox.look(b=CLASSIC)
    plain = inbox.live
    assert inbox.look(a=CLASSIC) and not inbox.look(a=CLASSIC)
    classic = inbox.live
    assert inbox.look(a=ChatOverride(stop=("###",))) and inbox.live not in (plain, classic)
    assert inbox.look() and inbox.live == plain and not inbox.look()


def test_no_restart_with_the_same_statement_undoes_a_rollback(inbox: Folder) -> None:
    inbox.look()
    plain = inbox.live
    inbox.look(a=CLASSIC)
    inbox.catalog.rollback("a")
    assert not inbox.look(a=CLASSIC) and inbox.live == plain


def test_a_refusal_belongs_to_its_statement(inbox: Folder) -> None:
    inbox.rules = Rules(inbox.rules.base, allow=frozenset({"chat_settings_invalid"}))
    inbox.look(a=CLASSIC)
    classic = inbox.live
    weights = inbox.folder / "a" / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    assert inbox.look(a=CLASSIC) and not inbox.look(a=CLASSIC), "it is remembered"
    assert inbox.look(), "and looked at again without"
    assert inbox.live == classic
    weights.write_bytes(data)
    assert inbox.look(a=CLASSIC) and inbox.live == classic


def test_a_statement_that_cannot_be_applied_is_tried_again(
    inbox: Folder, base_folder: Path, tmp_path: Path
) -> None:
    inbox.rules = Rules(base_with(tmp_path / "bare"))
    assert inbox.look(a=CLASSIC)
    assert inbox.last and [finding.code for finding in inbox.last.findings] == ["stated_chat_invalid"]
    assert inbox.catalog.names() == [] and not inbox.catalog.folders()
    base_with(tmp_path / "bare", {"eos_token": "</s>"})
    assert inbox.look(a=CLASSIC) and inbox.catalog.names() == ["a"]


def test_what_is_fetched_is_fetched_again_for_another_statement(inbox: Folder, rules: Rules) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for file in (inbox.folder / "a").iterdir():
        system.pipe(f"/stated/{file.name}", file.read_bytes())
    source = AdapterSource("remote", "memory://stated")
    for stated, pending in (
        ({}, True),
        ({}, False),
        ({"remote": CLASSIC}, True),
        ({"remote": CLASSIC}, False),
    ):
        again = Inbox(inbox.catalog, rules, stated)
        items = again.scan([source])
        assert [item.is_pending for item in items] == [pending]
        again.take_all(items)
    assert len(inbox.catalog.entry("remote").versions) == 2


def test_a_state_of_before_there_were_statements_loads(inbox: Folder) -> None:
    inbox.look()
    body = State({}, dict(inbox.catalog.folders())).to_json()
    for record in body["folders"].values():
        del record["chat"]
    assert State.from_json(body).folders == inbox.catalog.folders()
