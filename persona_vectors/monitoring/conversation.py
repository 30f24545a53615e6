"""A conversation whose answers are steered, watched and shown token by token."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.prompts import chat_text, decode, encode
from persona_vectors.model.sampling import row_seed
from persona_vectors.monitoring.heatmaps import token_texts
from persona_vectors.monitoring.readings import Readings
from persona_vectors.monitoring.trace import Trace, monitor
from persona_vectors.steering.add import steer
from persona_vectors.vectors.vector import PersonaVector


@dataclass
class Chat:
    """A conversation with a model. `coefs` steers it from the next answer on, by the vectors' names.

    The same `seed` gives the same answers to the same conversation.
    """

    model: Model
    tokenizer: PreTrainedTokenizerBase
    vectors: dict[str, PersonaVector]
    layer: int
    max_new_tokens: int = 256
    temperature: float = 0.7
    coefs: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    seed: int = 0

    def answer(self, text: str, show: Callable[[str, list[float]], object]) -> Readings:
        """Answer `text`, and return the projections of everything that was read: the conversation and the answer.

        `show` is called for each token once the model has read it, with its text and its projection on each vector
        before the steering's edit; for the last one, which is never read, with no projections. An interrupt (Ctrl-C)
        ends the answer, and what was read of it stays in the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode(self.tokenizer, chat_text(self.tokenizer, messages, add_generation_prompt=True))
        stops = stop_tokens(self.model, self.tokenizer)
        shown = 0

        def show_new(trace: Trace) -> None:
            nonlocal shown
            readings = trace.last
            texts = token_texts(
                self.tokenizer, [t for t in readings.tokens[0, len(prompt) :].tolist() if t not in stops]
            )
            while texts and texts[-1].endswith(("\ufffd", "·")) and len(texts) - shown < 4:  # half a character
                texts.pop()
            for index in range(shown, len(texts)):
                show(texts[index], readings.values[:, 0, len(prompt) + index].tolist())
            shown = max(shown, len(texts))

        with ExitStack() as stack:
            watched = list(self.vectors.values())
            trace = stack.enter_context(
                monitor(self.model, watched, layer=self.layer, stops=stops, every=1, callback=show_new)
            )
            for name, coef in self.coefs.items():  # inside the monitor, which so reads before their edits
                stack.enter_context(steer(self.model, self.vectors[name], layer=self.layer, coef=coef))
            try:
                [(answer, _)] = generate_tokens(
                    self.model,
                    self.tokenizer,
                    [prompt],
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    seed=[row_seed(self.seed, len(messages))],
                )
            except KeyboardInterrupt:
                if not shown:
                    raise
                answer = [t for t in trace.last.tokens[0, len(prompt) :].tolist() if t not in stops]
        for last in token_texts(self.tokenizer, answer)[shown:]:
            show(last, [])
        self.messages = [*messages, {"role": "assistant", "content": decode(self.tokenizer, answer)}]
        return trace.last
