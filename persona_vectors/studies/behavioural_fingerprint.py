"""Behavioural fingerprint: contrasts, inventory and projections of a model as one vector, and how far two are apart.

A coordinate is a mean over items: likelihood contrasts of seven traits over statement pairs, five factors of the IPIP
markers over items, projections on the vectors over answers on plain facts. The difference of two models is read item
by item, in standard deviations of the first model's items, and their distance is the root of the mean square over
coordinates. A retest is the same model behind another prompt that means "You are a helpful assistant."; the other
models are small LoRAs, one of them trained on optimistic statements and one on plain facts.

The paper: none in particular. Profiles of models by many scores are common; that a retest must be closer than
another model is asked of any of them.

A small model can show whether a fingerprint tells training from rewording, and in which coordinates; it cannot show
that two models with the same fingerprint behave alike elsewhere.
"""

from collections.abc import Sequence

from persona_vectors.data.texts import assistant_prompts, neutral_texts
from persona_vectors.evaluation.inventory import big_five
from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements, shipped_statements
from persona_vectors.evaluation.psychometrics import Items, change_distance, standard_changes
from persona_vectors.monitoring.projection import project
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.training.finetuning import training_rows
from persona_vectors.training.tuned import tuned

VECTORS = 1


def fingerprint(given: Given, system: str, trained_on: Sequence[tuple[str, str]] = ()) -> Items:
    """Return the fingerprint behind a system prompt, of the model or of a LoRA trained on questions and answers."""
    if trained_on:
        with tuned(given.model, training_rows(given.tokenizer, trained_on, max_length=256), seed=given.seed):
            return fingerprint(given, system)
    models, found = (given.model, given.tokenizer), {}
    for name in shipped_statements():
        statements = load_statements(name).split()[1].part(0, 4 * given.size)
        found[f"contrast, {name}"] = likelihood_contrast(*models, statements, system=system).tolist()
    found |= big_five(*models, system=system, first=2 * given.size)
    texts = [[("system", system), ("user", q), ("assistant", a)] for q, a in neutral_texts()[: 4 * given.size]]
    talks = [[{"role": role, "content": text} for role, text in talk] for talk in texts]
    for edit in given.edits:
        read = project(*models, talks, edit.vector, layer=edit.layer, poolings=["response_mean"])
        found[f"projection, {edit.vector.trait}"] = read.values[:, 0, 0].tolist()
    return found


def lines(given: Given) -> list[Line]:
    """Return distances, and coordinates: 2 `size` items of the inventory, 4 `size` of the others; 8 rows train."""
    statements = load_statements("optimistic").split()[0]
    data = {
        "optimistic statements": [(q, pair.pos) for q, pair in zip(statements.questions, statements.pairs)],
        "plain facts": neutral_texts()[-8:],
    }
    usual, *others = systems = assistant_prompts()[1:5]
    plain, *again = (given.once(text, fingerprint, given, text) for text in systems)
    largest, retests = f"largest of {len(others)} retests", [change_distance(plain, each) for each in again]
    null = max(each.mean for each in retests)
    result = [Line(f"distance of the retest {text!r}", each) for text, each in zip(others, retests)]
    loras = {name: given.once(f"LoRA on {name}", fingerprint, given, usual, rows) for name, rows in data.items()}
    result += [
        Line(f"distance of a LoRA on {n}", change_distance(plain, each), null, largest) for n, each in loras.items()
    ]
    changes = [standard_changes(plain, each) for each in (loras["optimistic statements"], *again)]
    for name, values in plain.items():
        moved, *retested = (over(each[name]) for each in changes)
        most = max(abs(each.mean) for each in retested)
        result += [Line(name, over(values)), Line(f"{name}: change by the first LoRA", moved, most, largest)]
    return result
