"""Heatmap: a text's tokens coloured by their projections, one row a vector, as HTML for notebooks and files."""

import math
from collections.abc import Collection, Mapping, Sequence
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
.pv-heatmap i:hover, .pv-heatmap i:focus { outline: 1px solid var(--ink); }
.pv-heatmap p i { position: relative; }
.pv-heatmap p i:focus::after { content: attr(title); position: absolute; left: 0; top: 100%; z-index: 1;
  padding: 0 6px; border-radius: 3px; background: var(--ink); color: var(--paper); white-space: nowrap; }
.pv-heatmap i.t { color: var(--rule); }
.pv-heatmap .about { font: 13px/1.4 system-ui, sans-serif; color: var(--rule); overflow-wrap: anywhere; }
.pv-heatmap i.l { background: rgb(var(--low) / var(--a)); }
.pv-heatmap i.h { background: rgb(var(--high) / var(--a)); }
.pv-heatmap .answer { border-left: 3px solid var(--rule); padding-left: 2px; }
"""
_FRAGMENT = """\
<div class="pv-heatmap"><style>{{ style | safe }}</style>
{% if title %}<div class="about">{{ title }}</div>{% endif %}
{% for row in rows %}<section><h2>{{ row.name }} <small><i class="l" style="--a: {{ strongest }}">\
{{ row.low }} away from it</i> {{ row.middle }} <i class="h" style="--a: {{ strongest }}">towards it {{ row.high }}</i>\
{{ row.unit }}</small></h2>
<p>{% for token in row.tokens %}{% if loop.index0 == answer %}<span class="answer"></span>{% endif %}\
<i tabindex="0"{% if token.side %} class="{{ token.side }}"{% endif %}{% if token.side in ("l", "h") %} \
style="--a: {{ token.strength }}"{% endif %} title="{{ token.value }}">{{ token.text }}</i>{% endfor %}</p></section>
{% endfor %}</div>
"""
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title></head>
<body>{{ fragment | safe }}</body></html>
"""
_STRONGEST = 0.45
ROLES = {"", "system", "developer", "user", "assistant", "model", "tool"}


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
    None: zero, which has no colour, plus and minus the 98th percentile of the answer's distances from it."""
    percentiles: Mapping[str, Sequence[float]] | None = field(default=None, repr=False)
    """Each token's percentile among neutral answers' tokens, which the colours then follow, from 0 to 100."""
    template: Sequence[bool] | None = field(default=None, repr=False)
    """Which tokens are the chat template's: they are shown grey, and neither coloured nor part of the scale."""
    title: str = field(default="", repr=False)
    """What stands above: the model, the layer, the prompt."""

    def __post_init__(self) -> None:
        given = [*self.rows.items(), *(self.percentiles or {}).items()]
        for name, values in given if self.template is None else [*given, ("template", self.template)]:
            if len(values) != len(self.tokens):
                raise InputError(f"{name!r} has {len(values)} values for {len(self.tokens)} tokens: give one for each")
        if self.span is not None and not self.span[0] < self.span[1]:
            raise InputError(f"span is {self.span}: give the lowest value and the highest")

    def _repr_html_(self) -> str:
        """Return the heatmap as an HTML fragment; every text in it is escaped."""
        rows = [self._row(name, list(values)) for name, values in self.rows.items()]
        return _render(_FRAGMENT, style=_STYLE, rows=rows, answer=self.answer, title=self.title, strongest=_STRONGEST)

    def save(self, path: str | Path) -> None:
        """Write a page that needs nothing else, whole or not at all."""
        save_heatmaps([self], path)

    def _row(self, name: str, values: list[float]) -> dict:
        placed, grey = self.percentiles is not None, self.template or [False] * len(values)
        coloured = values if self.percentiles is None else self.percentiles[name]
        low, high = (0.0, 100.0) if placed else self.span or self._span(values, grey)
        middle, half = (low + high) / 2, (high - low) / 2
        tokens = []
        for text, value, colour, plain in zip(self.tokens, values, coloured, grey):
            strength = 0.0 if math.isnan(value) else max(-1.0, min(1.0, (colour - middle) / half))
            shown = text.replace("\n", "↵\n")
            side = "t" if plain else "h" if strength > 0 else "l" if strength < 0 else ""
            label = "no value" if math.isnan(value) else f"{value:+.3f}" + f", percentile {colour:.0f}" * placed
            tokens.append(
                {"text": shown, "value": label, "side": side, "strength": f"{abs(strength) * _STRONGEST:.3f}"}
            )
        ends = {"low": low, "middle": middle, "high": high}
        unit = ": percentile among the tokens of neutral answers" if placed else ": projection on v/|v|"
        legend = {key: f"{value:{'.0f' if placed or not value else '+.3g'}}" for key, value in ends.items()}
        return {"name": name, "tokens": tokens, "unit": unit, **legend}

    def _span(self, values: Sequence[float], grey: Sequence[bool]) -> tuple[float, float]:
        """Return zero minus and plus what most of the answer's values lie within; of the prompt's where it is alone."""
        counted = [(place, abs(v)) for place, (v, plain) in enumerate(zip(values, grey)) if not plain and v == v]
        answer = [size for place, size in counted if place >= (self.answer or 0)]
        sizes = sorted(answer or [size for _, size in counted])
        half = sizes[int(0.98 * (len(sizes) - 1))] or sizes[-1] or 1.0 if sizes else 1.0
        return -half, half


def heatmap(
    tokenizer: PreTrainedTokenizerBase,
    trace: Trace | Readings,
    *,
    row: int = 0,
    span: tuple[float, float] | None = None,
    calibration: Calibration | Sequence[Calibration] | None = None,
    title: str = "",
) -> Heatmap:
    """Return the heatmap of one row of what a monitor has read: padding is left out, the end token is not.

    With the `calibration` of each vector, the colours follow its percentile among neutral answers' tokens, and 50 has
    none: raw projections have a scale and a middle of their own for every vector and layer. Above it stand the `title`
    (such as the model and the prompt), the layer, and whether the values are from before or after an edit.

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
    texts = token_texts(tokenizer, ids)
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    edits = ", ".join(dict.fromkeys(f"read {saw}" for saw in readings.saw.values() if saw != "unedited"))
    where = f"layer {', '.join(map(str, readings.saw))}" + (f"; {edits}" if edits else "")
    return Heatmap(
        texts,
        {key: v[shown].tolist() for key, v in values.items()},
        answer=answer if answer < len(ids) else None,
        span=span,
        percentiles=None if placed is None else {key: v[row][shown].tolist() for key, v in placed.items()},
        template=_template(special, ids, texts, answer),
        title=f"{title}: {where}" if title else where,
    )


def _template(special: Collection[int], ids: Sequence[int], texts: Sequence[str], answer: int) -> list[bool]:
    """Return which tokens are the chat template's: special ones; before the answer, a role and spaces after one."""
    found = [token in special for token in ids]
    for start in [index + 1 for index, token in enumerate(ids[:answer]) if token in special]:
        for end in range(start + 1, min(start + 6, answer) + 1):
            if "".join(texts[start:end]).strip() in ROLES:
                found[start:end] = [True] * (end - start)
    return found


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
