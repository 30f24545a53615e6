"""A vector's card: what its file says of it, as Markdown with the Hub's metadata."""

import re
from collections.abc import Sequence
from typing import Any

MADE = "<!-- written by persona-vectors card -->"
_SECTION = re.compile(r"^<!-- vector (.+?) -->\n(.*?)(?=^<!-- vector |\Z)", re.DOTALL | re.MULTILINE)
_HOW = ("judge", "threshold", "pairs_kept", "pos_answers", "neg_answers", "samples", "temperature", "seed", "date")


def vectors_card(vectors: Sequence[Any], *, repo: str | None = None, old: str = "") -> str:
    """Return the card of one or more PersonaVectors, of which the repository `repo` on the Hub may be the place.

    What `old`, an earlier card of that repository, says of other vectors is kept.
    """
    sections = {name: text.strip() for name, text in _SECTION.findall(old)}
    sections |= {vector.trait: _section(vector, repo) for vector in vectors}
    parts = [f"<!-- vector {name} -->\n{sections[name]}" for name in sorted(sections)]
    return "\n\n".join([f"---\n{_metadata(vectors, old)}\n---\n{MADE}\n\n# Persona vectors", _WHAT, *parts]) + "\n"


_WHAT = """\
Directions in a language model's residual stream, one for each decoder block, from contrastive prompts ([Chen et al.
2025](https://arxiv.org/abs/2507.21509)), made by `persona_vectors`. Row k of `directions` is taken from, and added to,
the raw output of block k, counted from 0; it points towards the trait, and is the raw difference of means. Harmful
traits are here to be measured and reduced."""


def _metadata(vectors: Sequence[Any], old: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    before = (ModelCard(old).data.to_dict().get("base_model") or []) if old else []
    models = {vector.model for vector in vectors if vector.model.count("/") == 1}  # else no model of the Hub
    models |= {before} if isinstance(before, str) else set(before)
    known: dict[str, Any] = {"base_model": sorted(models)} if models else {}
    known |= {"license": "other", "license_name": "that-of-the-model"}
    tags = ["persona-vectors", "activation-steering", "interpretability"]
    return str(ModelCardData(library_name="persona_vectors", tags=tags, **known).to_yaml()).strip()


def _section(vector: Any, repo: str | None) -> str:
    name = f"{repo}/{vector.trait}" if repo else f"{vector.trait}.safetensors"
    return "\n\n".join(
        [
            f"## {_text(vector.trait)}",
            f"`{_text(repr(vector))}`",
            "\n".join(f"- {line}" for line in _facts(vector)),
            "### Recommended use",
            _uses(vector),
            _side_effects(vector),
            f"```python\nimport persona_vectors as pv\n\nvector = pv.load_vector({name!r})\n```",
            "### Evidence by layer",
            _layers(vector),
        ]
    )


def _facts(vector: Any) -> list[str]:
    """Return what it is of, how it was made, and under which licence."""
    info = vector.info
    model = [vector.model, *(f"{name} {info[name]}" for name in ("revision", "config_hash") if info.get(name))]
    licence = info.get("licence", "unknown; directions derive from their model, whose licence applies")
    how = "; ".join(f"{name.replace('_', ' ')} {info[name]}" for name in _HOW if info.get(name) is not None)
    command = f"`{info['command']}`" if "command" in info else "unknown"
    return [
        f"**Model**: {_text(', '.join(model))}",
        f"**Pooling**: {_text(vector.pooling)}{'; whitened' * ('whitened' in info)}",
        f"**Made by**: {_text(command)}",
        f"**How**: {_text(how) or 'unknown'}",
        f"**Licence**: {_text(licence)}",
    ]


def _uses(vector: Any) -> str:
    if not vector.uses:
        return "None was measured: `persona-vectors contrast MODEL VECTOR --store`."
    rows = []
    for use in vector.uses.values():
        where = use.place if use.evidence else f"no recommendation (tried: {use.place})"
        rows.append([use.purpose, where, use.finding, f"`{use.source}`, {use.model}, {use.date}"])
    return _table(["to", "where", "effect [95 %] beside random vectors", "measured by"], rows)


def _side_effects(vector: Any) -> str:
    use = vector.uses.get("steer")
    span = "How far the model stays coherent under it was not measured."
    if use is not None and use.coherent is not None:
        low, high = use.coherent
        span = f"At layer {use.layer} the model stayed coherent from coefficient {low:+.3g} to {high:+.3g}."
    return (
        f"**Side effects**: {span} A vector moves more than its trait: `persona-vectors contrast` prints what several "
        "vectors do to each other's traits, and `pv.side_effects` runs benchmarks under it."
    )


def _layers(vector: Any) -> str:
    """Return the vector's length and reliability at every layer."""
    norms = vector.directions.float().norm(dim=1)
    ratio = None if vector.residual_norms is None else norms / vector.residual_norms
    columns = [norms, ratio, vector.split_half_cosine, vector.separation]
    rows = [
        [str(layer), *("?" if values is None else f"{float(values[layer]):.2f}" for values in columns)]
        for layer in range(len(norms))
    ]
    header = ["layer", "norm", "norm / residual", "split-half cosine", "separation (held-out AUROC)"]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: Any) -> str:
    """Return a value as one line that breaks no table and opens no tag."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
