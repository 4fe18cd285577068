"""One HTML page that holds a whole result: tables, notes and pictures, no other file and no network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
from rich.console import Console
from rich.table import Table

from serve.loadtest.report import is_loud

_PAGE = "page.html"  # beside this file


def make_page(
    title: str,
    sections: Sequence[tuple[str, Table | None, Sequence[str]]],
    pictures: Mapping[str, bytes],
    settings: Mapping[str, Any],
) -> bytes:
    """The page. A section is a title, the table of the terminal or None, and lines; loud ones stand out."""
    text = resources.files("serve.loadtest").joinpath(_PAGE).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True).from_string(text)
    body = template.render(
        title=title,
        sections=[
            {
                "title": name,
                "columns": [str(column.header) for column in table.columns] if table else [],
                "rows": _rows(table) if table else [],
                "lines": [{"text": line, "bad": is_loud(line)} for line in lines],
            }
            for name, table, lines in sections
        ],
        pictures=[(name, base64.b64encode(body).decode()) for name, body in pictures.items()],
        settings=json.dumps(settings, ensure_ascii=False, indent=2, default=str),
    )
    return body.encode(errors="replace")


def _rows(table: Table) -> list[dict[str, Any]]:
    console = Console(file=io.StringIO())
    columns = [list(column.cells) for column in table.columns]
    return [
        {
            "cells": [console.render_str(str(cell), markup=False).plain for cell in cells],
            "section": row.end_section,
        }
        for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True)
    ]
