"""The judges that ship and need no server."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.beside import in_background
from persona_vectors.evaluation.judge import COHERENCE_RUBRIC, Answer, Judge, fill, is_remote, score
from persona_vectors.evaluation.logprobs import answer_logprobs, next_token_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer
from persona_vectors.model.wrappers import unwrap


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
            return torch.zeros(0, dtype=torch.float32)
        of, signs = torch.tensor([i for i, _ in where]), torch.tensor([s for _, s in where], dtype=torch.float32)
        weighted = answer_logprobs(self.model, rows, desc="judging") * signs
        return torch.zeros(len(answers), dtype=torch.float32).index_add_(0, of, weighted)


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
        logprobs = answer_logprobs(self.model, rows, desc="coherence").tolist() if rows else []
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
        found = next_token_logprobs(self.model, [(prompt, list(stem)) for stem in stems])
        return [logprobs.exp() for logprobs in found]


def score_both(
    model: Model, tokenizer: PreTrainedTokenizerBase, judge: Judge, answers: Sequence[Answer], rubric: str
) -> list[tuple[float | None, float | None]]:
    """Return each answer's trait score and coherence; a perplexity gate stands in where the judge reads no rubric.

    A remote judge is asked for both at the same time.
    """
    if is_remote(judge):
        coherence = in_background(partial(score, judge, answers, COHERENCE_RUBRIC))
        return list(zip(score(judge, answers, rubric), coherence.result()))
    coherence_judge = judge if getattr(judge, "reads_rubric", True) else PerplexityJudge(model, tokenizer)
    scores = score(judge, answers, rubric, model=model)
    return list(zip(scores, score(coherence_judge, answers, COHERENCE_RUBRIC, model=model)))
