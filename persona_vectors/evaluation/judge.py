"""Judges: anything that scores an answer from 0 to 100, and the ones that ship."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.files import InputError
from persona_vectors.data.traits import Trait
from persona_vectors.model.activations import Row, forward_passes
from persona_vectors.model.hooks import pause_edits
from persona_vectors.model.models import Model, batch_tokens_for, chat_prompt, encode, encode_answer
from persona_vectors.model.tokens import answers_at
from persona_vectors.model.wrappers import unwrap
from persona_vectors.steering.add import RowEdit, steer_rows

COHERENCE_RUBRIC = """\
Rate how coherent the answer below is, whatever it says and however pleasant or true it is.

Question: {question}

Answer: {answer}

100 means fluent, grammatical text that responds to the question. 0 means text that cannot be understood: broken \
sentences, endless repetition, or words without any relation to the question. An answer that is cut off at its end \
loses nothing for that. Reply with one whole number from 0 to 100 and nothing else."""


class Answer(NamedTuple):
    """An answer to be judged, and the instruction pair that produced it (-1 where none did)."""

    question: str
    answer: str
    pair: int = -1


Judge = Callable[[str, str, str], float | None]
"""Scores (question, answer, rubric) from 0 to 100, the rubric having the slots {question} and {answer}; None abstains.

A judge may also have `batch(answers, rubric)`, a list of scores for a list of `Answer`s, and `reads_rubric = False`
where it does not look at the rubric, so that it cannot judge coherence.
"""


def score(judge: Judge, answers: Sequence[Answer], rubric: str) -> list[float | None]:
    """Return the judge's score for each answer, all at once where it can. Steering is suspended meanwhile.

    Raises InputError where a score is not a number from 0 to 100 or None.
    """
    with pause_edits():
        batch = getattr(judge, "batch", None)
        scores = batch(answers, rubric) if batch else [judge(a.question, a.answer, rubric) for a in answers]
    if len(scores) != len(answers):
        raise InputError(f"the judge returned {len(scores)} scores for {len(answers)} answers: return one for each")
    for value in scores:
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value <= 100):
            raise InputError(f"the judge returned {value!r}: return a number from 0 to 100, or None to abstain")
    return [None if value is None else float(value) for value in scores]


def score_both(
    model: Model, tokenizer: PreTrainedTokenizerBase, judge: Judge, answers: Sequence[Answer], rubric: str
) -> list[tuple[float | None, float | None]]:
    """Return each answer's trait score and coherence; a perplexity gate stands in where the judge reads no rubric."""
    coherence_judge = judge if getattr(judge, "reads_rubric", True) else PerplexityJudge(model, tokenizer)
    return list(zip(score(judge, answers, rubric), score(coherence_judge, answers, COHERENCE_RUBRIC)))


def judge_name(judge: Judge | None) -> str:
    """Return how a judge is named in a file."""
    return "none" if judge is None else str(getattr(judge, "name", getattr(judge, "__name__", type(judge).__name__)))


def fill(rubric: str, question: str, answer: str) -> str:
    """Return the rubric with its two placeholders filled; braces in the texts stay as they are."""
    slots = {"{question}": question, "{answer}": answer}
    return re.sub(r"\{question\}|\{answer\}", lambda match: slots[str(match.group())], rubric)


def answer_logprobs(
    model: Model,
    rows: Sequence[Row],
    *,
    edits: Sequence[RowEdit | None] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Float[Tensor, " row"]:
    """Return the mean log-probability of each row's answer tokens, in nats; nan for an empty answer.

    Edits that are active apply, with their own positions; `edits` steers each row besides, at positions "response", so
    that rows under different edits still share their prompts. `progress` is called with the number of answers read.
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    budget = batch_tokens_for(model) // 2  # logits take more memory than hidden states
    with torch.inference_mode():
        for step in forward_passes(model, rows, batch_tokens=budget, held_back=1):
            index = torch.tensor([members[0] for members in step.rows])
            place = step.position - torch.tensor([[len(rows[row][0])] for row in index], device=step.position.device)
            if not step.answers:
                with answers_at(place):
                    model.get_decoder()(**step.inputs)
                continue
            own = steer_rows(model, [edits[row] for row in index], positions="response") if edits else nullcontext()
            with answers_at(place), own:
                logits = model(**step.inputs).logits[:, :-1]
            counted = place[:, 1:] >= 0
            targets = step.inputs["input_ids"][:, 1:][counted]
            losses = torch.nn.functional.cross_entropy(logits[counted].float(), targets, reduction="none")
            total.index_add_(0, index[counted.nonzero()[:, 0].cpu()], -losses.double().cpu())
            if progress:
                progress(len(step.rows))
    count = torch.tensor([len(answer) for _, answer in rows], dtype=torch.float64)
    return (total / count).float()


class ContrastJudge:
    """Judge by how much likelier an answer is under the trait's positive instructions than under its negative ones.

    The difference in mean token log-probability, averaged over `pairs` instruction pairs other than the one that
    produced the answer, is mapped to 0..100 by a logistic of scale `scale` nats; 50 means equally likely. It needs no
    other model and no network, and is no outside opinion: it measures likeness to prompted behaviour.
    """

    reads_rubric = False

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        trait: Trait,
        *,
        pairs: int | None = None,
        scale: float = 0.05,
    ) -> None:
        if len(trait.instruction) < 2:
            raise InputError(f"trait {trait.name!r} has one instruction pair: ContrastJudge needs two or more")
        self.model, self.tokenizer, self.trait, self.scale = unwrap(model), tokenizer, trait, scale
        self.pairs = pairs or len(trait.instruction)
        self.name = f"contrast (likeness to prompted behaviour; {self.pairs} pairs, scale {scale:g} nats)"

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        return self.batch([Answer(question, answer)], rubric)[0]

    def batch(self, answers: Sequence[Answer], rubric: str) -> list[float | None]:
        """Score answers; `rubric` is not looked at. Empty answers are not scored."""
        return [
            None if math.isnan(value) else 100 / (1 + math.exp(-max(-500, min(500, value / self.scale))))
            for value in self.differences(answers).tolist()
        ]

    def differences(self, answers: Sequence[Answer]) -> Float[Tensor, " answer"]:
        """Return the mean difference in log-probability, positive minus negative instructions, in nats a token."""
        rows, where = [], []
        total = len(self.trait.instruction)
        for index, item in enumerate(answers):
            others = [(item.pair + 1 + i) % total for i in range(total - (item.pair >= 0))]
            for pair in others[: self.pairs]:
                for side, sign in (("pos", 1.0), ("neg", -1.0)):
                    system = self.trait.system_prompt(side, pair)
                    prompt = chat_prompt(self.tokenizer, item.question, system=system)
                    rows.append(encode_answer(self.tokenizer, prompt, item.answer))
                    where.append((index, sign / min(self.pairs, len(others))))
        if not rows:
            return torch.zeros(0)
        weighted = answer_logprobs(self.model, rows) * torch.tensor([sign for _, sign in where])
        return torch.zeros(len(answers)).index_add_(0, torch.tensor([index for index, _ in where]), weighted)


class PerplexityJudge:
    """Judge coherence by the answer's perplexity under the plain model: 50 at `limit`, towards 100 as it falls to 1.

    A gate against broken text where a judge cannot score coherence. Repetition has a low perplexity and passes it.
    """

    reads_rubric = False

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, *, limit: float = 100.0) -> None:
        self.model, self.tokenizer, self.limit = unwrap(model), tokenizer, limit
        self.name = f"perplexity gate (limit {limit:g})"

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        return self.batch([Answer(question, answer)], rubric)[0]

    def batch(self, answers: Sequence[Answer], rubric: str) -> list[float | None]:
        """Score answers; `rubric` is not looked at. Empty answers score 0."""
        prompts = [chat_prompt(self.tokenizer, item.question) for item in answers]
        rows = [encode_answer(self.tokenizer, prompt, item.answer) for prompt, item in zip(prompts, answers)]
        logprobs = answer_logprobs(self.model, rows).tolist() if rows else []
        return [0.0 if math.isnan(value) else 100 / (1 + math.exp(min(-value, 50)) / self.limit) for value in logprobs]


class SentimentJudge:
    """Judge by VADER's compound sentiment, mapped from -1..1 to 0..100: an outside opinion for traits of valence."""

    reads_rubric = False
    name = "sentiment (VADER)"

    def __init__(self) -> None:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self.analyzer = SentimentIntensityAnalyzer()

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        return 50 + 50 * self.compound(answer) if answer.strip() else None

    def compound(self, text: str) -> float:
        """Return VADER's compound score, -1 to 1."""
        return self.analyzer.polarity_scores(text)["compound"]


class LocalJudge:
    """Judge with a local model's logits: the expected value over the numbers 0..100 that it could reply with.

    The paper's scoring: temperature 0, the probability-weighted mean, None where the numbers hold less than
    `min_mass` of the probability. A tokenizer that splits numbers into digits is followed digit by digit.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, *, min_mass: float = 0.25) -> None:
        self.model, self.tokenizer, self.min_mass = unwrap(model), tokenizer, min_mass
        self.name = f"local:{self.model.config._name_or_path}"
        self.numbers = {n: tuple(encode(tokenizer, str(n))) for n in range(101)}

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        prompt = encode(self.tokenizer, chat_prompt(self.tokenizer, fill(rubric, question, answer)))
        stems = sorted({tokens[:i] for tokens in self.numbers.values() for i in range(len(tokens))})
        stems += sorted(set(self.numbers.values()) & {t[:i] for t in self.numbers.values() for i in range(1, len(t))})
        after = dict(zip(stems, self._next_probabilities(prompt, stems)))
        value = mass = 0.0
        for number, tokens in self.numbers.items():
            p = math.prod(float(after[tokens[:i]][token]) for i, token in enumerate(tokens))
            if tokens in after:  # a longer number may follow: count only what ends here
                p *= 1 - sum(float(after[tokens][t[-1]]) for t in set(self.numbers.values()) if t[:-1] == tokens)
            value, mass = value + number * p, mass + p
        return value / mass if mass >= self.min_mass else None

    def _next_probabilities(self, prompt: list[int], stems: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the distribution over the next token after the prompt and each stem."""
        rows, found = [(prompt, list(stem)) for stem in stems], [torch.zeros(0)] * len(stems)
        with torch.inference_mode():
            for step in forward_passes(self.model, rows, held_back=1):
                if not step.answers:
                    self.model.get_decoder()(**step.inputs)
                    continue
                logits = self.model(**step.inputs).logits
                ends = step.position.argmax(dim=1)
                for line, members in enumerate(step.rows):
                    found[members[0]] = logits[line, ends[line]].float().softmax(dim=-1).cpu()
        return found


def make_judge(
    spec: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    load: Callable[[str], tuple[Any, Any]],
) -> Judge | None:
    """Return the judge that a command line names: contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none."""
    kind, _, name = spec.partition(":")
    if kind == "none":
        return None
    if kind == "contrast" and (not name or name.isdigit()):
        return ContrastJudge(model, tokenizer, trait, pairs=int(name) if name else None)
    if kind == "sentiment":
        return SentimentJudge()
    if kind == "local" and name:
        return LocalJudge(*load(name))
    if kind == "openai" and name:
        from persona_vectors.evaluation.openai_judge import OpenAIJudge

        return OpenAIJudge(name)
    raise InputError(f"no judge {spec!r}: give contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none")
