"""Is a judge to be trusted? Its agreement with labels, and whether it tells a trait's own exemplars apart."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from persona_vectors.data.errors import InputError
from persona_vectors.data.tables import Table
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.judge import Answer, Judge, judge_name, score
from persona_vectors.evaluation.likelihood import Statements


class Labelled(NamedTuple):
    """An answer, and whether it shows the trait."""

    question: str
    answer: str
    shows: bool


@dataclass(frozen=True)
class JudgeReport(Table):
    """How well a judge agrees with labels; an answer that it scores 50 or more counts as showing the trait."""

    judge: str
    answers: int
    abstained: int
    auroc: float
    """Of its scores against the labels: 1 tells all apart, 0.5 none."""
    kappa: float
    """Cohen's, of its verdicts."""
    confusion: tuple[tuple[int, int], tuple[int, int]]
    """[label][verdict], "does not show it" first."""

    def __str__(self) -> str:
        (tn, fp), (fn, tp) = self.confusion
        return (
            f"{self.judge}: AUROC {self.auroc:.2f}, kappa {self.kappa:.2f} on {self.answers} answers "
            f"({tp} true and {fp} false positives, {tn} true and {fn} false negatives, {self.abstained} abstentions)"
        )


def load_labels(path: str | Path) -> list[Labelled]:
    """Read labelled answers from JSONL or CSV: question, answer, and label, 1 where the answer shows the trait.

    Raises InputError, naming the line, where one does not have them.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}: give JSONL or CSV with question, answer and label (0 or 1)")
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(x) for x in file if x.strip()]
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not JSONL ({error}): one JSON object a line") from None
    found = []
    for number, row in enumerate(rows, start=1):
        label = str(row.get("label")).lower() if isinstance(row, dict) else ""
        if label not in ("0", "1", "true", "false") or not {"question", "answer"} <= set(row):
            raise InputError(f"{path}, answer {number}: give question, answer and label (0 or 1), not {str(row)[:80]}")
        found.append(Labelled(row["question"], row["answer"], label in ("1", "true")))
    return found


def check_judge(judge: Judge, labelled: Sequence[Labelled], rubric: str) -> JudgeReport:
    """Return the judge's agreement with labels. Abstentions are counted and left out.

    Raises InputError where one of the two labels is missing among the answers that it scored.
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix, roc_auc_score

    scores = score(judge, [Answer(item.question, item.answer) for item in labelled], rubric)
    known = [(item.shows, value) for item, value in zip(labelled, scores) if value is not None]
    labels, verdicts = [shows for shows, _ in known], [value >= 50 for _, value in known]
    if len(set(labels)) < 2:
        raise InputError(
            f"the judge {judge_name(judge)!r} scored {len(known)} of {len(labelled)} answers, and these do not have "
            "both labels: give answers that show the trait and answers that do not, or take another judge"
        )
    counts = confusion_matrix(labels, verdicts, labels=[False, True]).tolist()
    return JudgeReport(
        judge_name(judge),
        len(labelled),
        len(labelled) - len(known),
        float(roc_auc_score(labels, [value for _, value in known])),
        float(cohen_kappa_score(labels, verdicts, labels=[False, True])),
        (tuple(counts[0]), tuple(counts[1])),
    )


def require_valid_judge(
    judge: Judge, trait: Trait, statements: Statements, *, min_auroc: float = 0.7, max_abstained: float = 0.5
) -> JudgeReport:
    """Have the judge score a trait's own exemplars, and refuse it where it cannot tell the two sides apart.

    Raises InputError where its AUROC is under `min_auroc`, or it abstains on more than `max_abstained` of them.
    """
    asked = list(zip(statements.questions, statements.pairs))
    labelled = [Labelled(question, pair.pos, True) for question, pair in asked]
    labelled += [Labelled(question, pair.neg, False) for question, pair in asked]
    report = check_judge(judge, labelled, trait.eval_prompt)
    if report.auroc < min_auroc or report.abstained > max_abstained * report.answers:
        raise InputError(
            f"this judge cannot be trusted with {trait.name!r}: {report}, and AUROC {min_auroc:g} with at most "
            f"{max_abstained:.0%} abstentions is asked for; take a stronger judge, or mend the rubric"
        )
    return report
