"""Before the first step: would a server take what this run is going to write?"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train.adapter_files import adapter_config, adapter_shapes
from train.export import whole_template
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.chat_template import judge_template
from vllm_lora_ext.contract import Identity, write_contract
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.inspection import Rules, inspect_adapter
from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE
from vllm_lora_ext.spec import Finding, Severity

if TYPE_CHECKING:
    from peft import PeftModel

_FLOAT32_BYTES = 4


def require_servable(model: PeftModel, identity: Identity, base_model: str) -> tuple[Finding, ...]:
    """What a server would say about the finished adapter, as far as weights do not matter.

    Admission itself reads a folder with the adapter's config, chat settings and a file of weights that is
    a header before a hole: it takes no space and no time, whatever the rank. Gives what does not refuse
    the adapter (`Severity.UNPROVEN`, warnings and notes).

    Raises:
        AdapterRefused: with every finding.
    """
    base = read_base_model(base_model)
    with tempfile.TemporaryDirectory(prefix="vllm-lora-check-") as place:
        folder = Path(place) / "adapter"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(adapter_config(model)), encoding="utf-8")
        write_hollow(folder / WEIGHTS_FILE, adapter_shapes(model))
        write_contract(folder, identity)
        inspection = inspect_adapter(folder, Rules(base, (base.public_name,)), identity.name)
    return _unless_refused(identity.name, inspection.findings)


def require_servable_model(identity: Identity) -> tuple[Finding, ...]:
    """As `require_servable`, for a whole model: its shapes are the base's, but its chat template is new.

    Raises:
        AdapterRefused: no server should render the template.
    """
    return _unless_refused(identity.name, tuple(judge_template(whole_template(identity))))


def _unless_refused(name: str, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    refusals = [finding for finding in findings if finding.severity is Severity.REFUSED]
    if not refusals:
        return findings
    rule = "asked what a server would say, so nothing was trained"
    way_out = Finding("serve_check", "--serve-check", rule, "--no-serve-check trains it.", Severity.NOTE)
    raise AdapterRefused(name, [*refusals, way_out])


def write_hollow(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 tensors that were never written: its header, then a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = _FLOAT32_BYTES
        for width in shape:
            size *= width
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
