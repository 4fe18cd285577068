"""With --catalog-from-source the adapters folders alone decide what is served, on each of many replicas.

So a change that came by command, and that no folder holds, must neither be made nor be there from before.
"""

from __future__ import annotations

from serve.config import ServeConfig
from serve.openai_errors import ApiError
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting

_FLAG = "--catalog-from-source"
_SHOWN = 5


def must_follow_source(config: ServeConfig, catalog: Catalog) -> None:
    """Look at what the server would begin with.

    Raises:
        BadSetting: there is no folder to follow, or the state has what came by command.
    """
    if not config.adapters or not config.watch:
        rule = "needs a folder of adapters that is watched"
        raise BadSetting(_FLAG, rule, "Give --adapters DIR, and leave --no-watch out.")
    if changed := changed_by_command(catalog):
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        rule = f"the state folder holds what came by command: {', '.join(changed[:_SHOWN])}{more}"
        raise BadSetting(_FLAG, rule, "Start with an empty --state-dir.")


def changed_by_command(catalog: Catalog) -> list[str]:
    """Names that were published, rolled back, split or removed by command, in order."""
    entries = {entry.name: entry for entry in catalog.entries()}
    changed = {
        entry.name
        for entry in entries.values()
        if entry.folder is None or entry.traffic or entry.history[-1].what != "publish"
    }
    taken = {record.name for record in catalog.folders().values() if not record.findings}
    return sorted(changed | (taken - set(entries)))


def source_decides() -> ApiError:
    """The answer to a request that would change an adapter."""
    message = "What this server serves is decided by its adapters folder alone. Change it there."
    return ApiError(409, message, "catalog_from_source")
