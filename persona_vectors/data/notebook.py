"""How values show themselves in a notebook."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def html_table(title: str, rows: Sequence[Mapping[str, Any]], *, first: int = 10) -> str:
    """Return a title and the first rows as HTML for a notebook: everything escaped, long texts cut, floats short."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else " ".join(str(value).split())
        return f"<td style='text-align:left'>{escape(text[:200])}{'…' * (len(text) > 200)}</td>"

    names = list(dict.fromkeys(name for row in rows[:first] for name in row))
    head = "".join(f"<th style='text-align:left'>{escape(name.replace('_', ' '))}</th>" for name in names)
    lines = ["".join(cell(row.get(name)) for name in names) for row in rows[:first]]
    more = f"<p>and {len(rows) - first:,} rows more</p>" if len(rows) > first else ""
    body = "".join(f"<tr>{line}</tr>" for line in [head, *lines]) if rows else ""
    return f"<b>{escape(title)}</b><table>{body}</table>{more}"
