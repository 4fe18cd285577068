"""One adapter published by command, and whether what was published may be served here and now."""

from __future__ import annotations

from vllm_lora_ext.admission import allow, judge_rank
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.chat_override import AS_IT_IS, ChatOverride
from vllm_lora_ext.errors import VllmLoraError
from vllm_lora_ext.inbox import version_of
from vllm_lora_ext.inspection import Inspection, Rules, inspect_adapter
from vllm_lora_ext.intake import admit
from vllm_lora_ext.records import Entry, Version
from vllm_lora_ext.sources import AdapterSource, fetched
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.store import AdapterStore


def publish(
    source: AdapterSource,
    catalog: Catalog,
    rules: Rules,
    replace: bool = False,
    chat: ChatOverride = AS_IT_IS,
) -> tuple[Entry, Inspection]:
    """Make what `source` holds, with the chat settings that are stated in `chat`, its name's live version.

    Raises:
        AdapterRefused: with every finding; nothing was changed.
        AdapterExists: the name has other content, and `replace` is off.
        StoreFailed: the disk is full.
    """
    with fetched(source, catalog.incoming) as folder:
        admitted = admit(folder, catalog.store, rules, source.name, chat=chat)
    try:
        version = version_of(admitted, catalog, rules, source)
        return catalog.publish(source.name, version, replace), admitted.inspection
    finally:
        admitted.version.release()
        catalog.collect()


def is_whole(version: Version, store: AdapterStore) -> bool:
    """Whether a store has all files of a version, in their sizes; `verify` reads them."""
    sizes = [part[:1] for part in store.signature(version.digest)]
    return store.has(version.digest) and sizes == [list(part[:1]) for part in version.signature]


def judge_published(name: str, version: Version, catalog: Catalog, rules: Rules) -> list[Finding]:
    """What speaks against serving a stored version with these limits and on this base; reads no weights."""
    if not is_whole(version, catalog.store):
        rule = "is not whole in the store any more"
        return [Finding("version_damaged", f"{name}@{version.short}", rule, "Publish the adapter again.")]
    findings = judge_rank(name, version.rank, rules.limits)
    if rules.base is not None and version.base != rules.base.fingerprint:
        # It was judged on another base, and may fit this one as well.
        try:
            folder = catalog.store.open(version.digest).folder
        except VllmLoraError as error:
            return [Finding("version_damaged", error.item, error.rule, error.fix)]
        findings = list(inspect_adapter(folder, rules, name).findings)
    return allow(findings, rules.allow)
