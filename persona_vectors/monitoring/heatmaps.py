"""Heatmap: a text's tokens coloured by their projections, one row a vector, as HTML for notebooks and files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.monitoring.readings import Readings
from persona_vectors.monitoring.trace import Trace

# Orange and blue are told apart with every common kind of colour blindness. The text keeps a contrast of 4.5 or more.
_STYLE = """
.pv-heatmap { --low: 0 90 181; --high: 220 105 0; --ink: #1a1a1a; --paper: #ffffff; --rule: #767676;
  color: var(--ink); background: var(--paper); font: 14px/1.9 ui-monospace, monospace; padding: 8px 12px; }
@media (prefers-color-scheme: dark) {
  .pv-heatmap { --low: 60 140 255; --high: 235 120 20; --ink: #f0f0f0; --paper: #161616; --rule: #8f8f8f; } }
.pv-heatmap h2 { font: 600 14px/1.4 system-ui, sans-serif; margin: 12px 0 2px; color: inherit; }
.pv-heatmap h2 small { font-weight: 400; }
.pv-heatmap p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.pv-heatmap i { font-style: normal; border-radius: 2px; padding: 2px 0; }
.pv-heatmap i:hover { outline: 1px solid var(--ink); }
.pv-heatmap i.l { background: rgb(var(--low) / var(--a)); }
.pv-heatmap i.h { background: rgb(var(--high) / var(--a)); }
.pv-heatmap .answer { border-left: 3px solid var(--rule); padding-left: 2px; }
"""
_FRAGMENT = """\
<div class="pv-heatmap"><style>{{ style | safe }}</style>
{% for row in rows %}<section><h2>{{ row.name }} <small><i class="l" style="--a: {{ strongest }}">\
{{ row.low }}</i> {{ row.middle }} <i class="h" style="--a: {{ strongest }}">{{ row.high }}</i>\
{{ row.unit }}</small></h2>
<p>{% for token in row.tokens %}{% if loop.index0 == answer %}<span class="answer"></span>{% endif %}\
<i{% if token.side %} class="{{ token.side }}" style="--a: {{ token.strength }}"{% endif %} title="{{ token.value }}">\
{{ token.text }}</i>{% endfor %}</p></section>
{% endfor %}</div>
"""
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title></head>
<body>{{ fragment | safe }}</body></html>
"""
_STRONGEST = 0.45


@dataclass(frozen=True)
class Heatmap:
    """Tokens and their projections, one row of values a vector: shown by a notebook, or saved as a page of its own."""

    tokens: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    """A vector's name and the value at each token; nan is left uncoloured."""
    answer: int | None = None
    """The first token of the answer, marked by a bar; None where there is none."""
    span: tuple[float, float] | None = None
    """The values with the strongest colours, the same for every row, so that heatmaps can be compared.
    None: each row's median, plus and minus the 98th percentile of the distances from it."""
    percentiles: Mapping[str, Sequence[float]] | None = field(default=None, repr=False)
    """Each token's percentile among neutral answers' tokens, which the colours then follow, from 0 to 100."""

    def __post_init__(self) -> None:
        for name, values in [*self.rows.items(), *(self.percentiles or {}).items()]:
            if len(values) != len(self.tokens):
                raise InputError(f"{name!r} has {len(values)} values for {len(self.tokens)} tokens: give one for each")
        if self.span is not None and not self.span[0] < self.span[1]:
            raise InputError(f"span is {self.span}: give the lowest value and the highest")

    def _repr_html_(self) -> str:
        """Return the heatmap as an HTML fragment; every text in it is escaped."""
        rows = [self._row(name, list(values)) for name, values in self.rows.items()]
        return _render(_FRAGMENT, style=_STYLE, rows=rows, answer=self.answer, strongest=_STRONGEST)

    def save(self, path: str | Path) -> None:
        """Write a page that needs nothing else, whole or not at all."""
        save_heatmaps([self], path)

    def _row(self, name: str, values: list[float]) -> dict:
        placed = self.percentiles is not None
        coloured = values if self.percentiles is None else self.percentiles[name]
        low, high = (0.0, 100.0) if placed else self.span or robust_span(values)
        middle, half = (low + high) / 2, (high - low) / 2
        tokens = []
        for text, value, colour in zip(self.tokens, values, coloured):
            strength = 0.0 if math.isnan(value) else max(-1.0, min(1.0, (colour - middle) / half))
            shown = text.replace("\n", "↵\n")
            side = "h" if strength > 0 else "l" if strength < 0 else ""
            label = "no value" if math.isnan(value) else f"{value:+.3f}" + f", percentile {colour:.0f}" * placed
            tokens.append(
                {"text": shown, "value": label, "side": side, "strength": f"{abs(strength) * _STRONGEST:.3f}"}
            )
        ends = {"low": low, "middle": middle, "high": high}
        unit = " percentile among the tokens of neutral answers" if placed else ""
        legend = {key: f"{value:{'.0f' if placed else '+.3g'}}" for key, value in ends.items()}
        return {"name": name, "tokens": tokens, "unit": unit, **legend}


def heatmap(
    tokenizer: PreTrainedTokenizerBase,
    trace: Trace | Readings,
    *,
    row: int = 0,
    span: tuple[float, float] | None = None,
    calibration: Calibration | Sequence[Calibration] | None = None,
) -> Heatmap:
    """Return the heatmap of one row of what a monitor has read: padding is left out, the end token is not.

    With the `calibration` of each vector, the colours follow its percentile among neutral answers' tokens, and 50 has
    none: raw projections have a scale and a middle of their own for every vector and layer.

    Raises InputError where there is no such row, or the model read embeddings and not tokens.
    """
    if span is not None and calibration is not None:
        raise InputError("span and calibration both say which values are coloured: give one of them")
    readings = trace.last if isinstance(trace, Trace) else trace
    if not 0 <= row < len(readings.real):
        raise InputError(f"row {row} is out of range: this trace has rows 0 to {len(readings.real) - 1}")
    values = {key: readings[key][row] for key in readings.keys}
    shown = (~next(iter(values.values())).isnan()).nonzero()[:, 0]
    ids = readings.tokens[row][shown].tolist()
    if min(ids, default=0) < 0:
        raise InputError("this model was given embeddings, so the heatmap has no text: give it input_ids")
    answer = int((shown < readings.prompt_width).sum())
    placed = None if calibration is None else readings.percentiles(calibration)
    return Heatmap(
        token_texts(tokenizer, ids),
        {key: v[shown].tolist() for key, v in values.items()},
        answer=answer if answer < len(ids) else None,
        span=span,
        percentiles=None if placed is None else {key: v[row][shown].tolist() for key, v in placed.items()},
    )


def save_heatmaps(heatmaps: Sequence[Heatmap], path: str | Path) -> None:
    """Write several heatmaps, one below the other, as a page that needs nothing else; whole or not at all."""
    title = ", ".join(dict.fromkeys(name for shown in heatmaps for name in shown.rows))
    with atomic_path(path) as temporary:
        page = _render(_PAGE, title=title, fragment="".join(shown._repr_html_() for shown in heatmaps))
        temporary.write_text(page, "utf-8")


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return each token's part of the decoded text: white space is kept, special tokens are shown.

    A character of several tokens stands at the last of them, and the ones before it are shown as a dot.
    """
    texts, begin, done = [], 0, 0  # ids[begin:done] is the text that the next token is decoded after
    for end in range(1, len(ids) + 1):
        before, now = (str(tokenizer.decode(list(ids[begin:stop]))) for stop in (done, end))
        if now.endswith("\ufffd") and end - done < 4 and end < len(ids):
            texts.append("·")
        else:
            texts.append(now[len(before) :])
            begin, done = done, end
    return texts


def robust_span(values: Sequence[float]) -> tuple[float, float]:
    """Return the median minus and plus the 98th percentile of the distances from it, which outliers do not move."""
    finite = sorted(value for value in values if not math.isnan(value))
    if not finite:
        return -1.0, 1.0
    median = finite[len(finite) // 2]
    distances = sorted(abs(value - median) for value in finite)
    half = distances[int(0.98 * (len(distances) - 1))] or distances[-1] or 1.0
    return median - half, median + half


def _render(template: str, **values: object) -> str:
    return Environment(autoescape=True).from_string(template).render(**values)
