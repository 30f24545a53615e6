"""Inspect's evaluations on a model that is steered, and a persona judge as Inspect's scorer."""

from collections import Counter
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.judge import Answer, Judge, score
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.identity import hash_of
from persona_vectors.model.prompts import chat_text, decode, encode
from persona_vectors.model.sampling import row_seed

_SAMPLING = {"max_tokens", "temperature", "seed"}
_REFUSED = {"top_p", "top_k", "stop_seqs", "frequency_penalty", "presence_penalty", "logit_bias", "num_choices"}
_REFUSED |= {"logprobs", "response_schema"}


def inspect_model(model: Model, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a model for Inspect that answers as ours stands: with every edit that is active around `inspect_ai.eval`.

    `with pv.steer(model, vector): inspect_ai.eval(task, model=pv.inspect_model(model, tokenizer))`. Of Inspect's
    settings `max_tokens` (by default 128), `temperature` (1) and `seed` (0) are read; the same question asked again has
    another seed. Answers come one by one. Raises InputError for tools, and for settings that change how is sampled.
    """
    inspect = _library().model
    asked: Counter[str] = Counter()

    @inspect.modelapi(name="persona_vectors")
    class Given(inspect.ModelAPI):  # type: ignore[name-defined]
        async def generate(self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any) -> Any:
            refused = sorted(_REFUSED & set(config.model_dump(exclude_none=True))) + ["tools"] * bool(tools)
            if refused:
                raise InputError(f"{', '.join(refused)}: leave it out; what is read is {', '.join(sorted(_SAMPLING))}")
            messages = [{"role": message.role, "content": message.text} for message in input]
            text = chat_text(tokenizer, messages, add_generation_prompt=True)
            ids, seed = encode(tokenizer, text), row_seed(config.seed or 0, int(hash_of([text, asked[text]]), 16))
            asked[text] += 1
            options: dict[str, Any] = {"max_new_tokens": config.max_tokens or 128, "seed": [seed]}
            options["temperature"] = 1.0 if config.temperature is None else config.temperature
            ((tokens, ended),) = generate_tokens(model, tokenizer, [ids], **options)
            reason = "stop" if ended else "max_tokens"
            output = inspect.ModelOutput.from_content(self.model_name, decode(tokenizer, tokens), stop_reason=reason)
            counts = {"input_tokens": len(ids), "output_tokens": len(tokens)}
            output.usage = inspect.ModelUsage(**counts, total_tokens=sum(counts.values()))
            return output

    return inspect.Model(Given(model_name(model)), inspect.GenerateConfig())


def inspect_scorer(*, judge: Judge, rubric: str) -> Any:
    """Return a scorer for Inspect: a judge's score of each answer by a trait's `eval_prompt`, its mean and error.

    The question is the sample's input. Steering is suspended while it is judged; where the judge abstains the sample is
    left unscored.
    """
    inspect = _library().scorer

    @inspect.scorer(metrics=[inspect.mean(), inspect.stderr()])
    def persona() -> Any:
        async def judged(state: Any, target: Any) -> Any:
            answer = state.output.completion
            (value,) = score(judge, [Answer(state.input_text, answer)], rubric)
            if value is None:
                return inspect.Score.unscored(answer=answer)
            return inspect.Score(value=value, answer=answer)

        return judged

    return persona()


def _library() -> Any:
    try:
        import inspect_ai.model
        import inspect_ai.scorer
    except ImportError:
        raise InputError("Inspect is missing: pip install 'persona-vectors-toolkit[inspect]'") from None
    return inspect_ai
