"""Findings that more than one part of admission gives, and how many of them become one."""

from __future__ import annotations

from vllm_lora_ext.files import LinkRefused, NotRegularFile, TooLarge
from vllm_lora_ext.spec import Finding


def file_finding(error: Exception, item: str) -> Finding:
    """The finding for a file that could not be read."""
    if isinstance(error, LinkRefused):
        return Finding(
            "link_refused", item, "is a link, and links may lead out of the folder", "Upload the file."
        )
    if isinstance(error, NotRegularFile):
        return Finding("not_regular_file", item, "is no regular file", "Copy the file again.")
    if isinstance(error, TooLarge):
        return Finding("too_large", item, str(error).partition(" ")[2], "Remove what does not belong in it.")
    if isinstance(error, PermissionError):
        return Finding(
            "permission_denied", item, "may not be read by this process", f"Run chmod a+r on {item}."
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Finding("adapter_missing", item, "went away while it was read", "Publish it again.")
    if isinstance(error, OSError):
        rule = f"cannot be read ({error.strerror})"
        return Finding("read_failed", item, rule, "Check the disk, and publish it again.")
    return Finding("changed_while_reading", item, "changed while it was read", "Publish it again.")


def fold(findings: list[Finding]) -> list[Finding]:
    """One finding per code, fix and severity when many items break the same rule, with the count."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.code, finding.fix, finding.severity), []).append(finding)
    folded = []
    for (code, fix, _), group in groups.items():
        first = group[0]
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        folded.append(Finding(code, first.item, first.rule + more, fix, first.severity))
    return folded
