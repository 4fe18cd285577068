"""Entry point of `vllm.general_plugins`: runs in every vLLM process, any number of times.

Nothing is imported here that could fail: vLLM logs a plugin that cannot be imported and goes on
without it. What fails inside `register` ends the process, as it should.
"""

from __future__ import annotations


def register() -> None:
    """Put our parts where vLLM looks for its own.

    Raises:
        MissingPackage: this vLLM lacks what we replace; better no server than wrong answers.
    """
    from vllm_lora_ext.engine import install, parent

    parent.end_with_parent()
    install.install()
