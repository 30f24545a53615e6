"""What a request may hold: OpenAI's fields, and ours under `persona_vectors`."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from persona_vectors.data.errors import InputError

Number = Annotated[float, Field(allow_inf_nan=False)]
B = TypeVar("B", bound=BaseModel)
# What would change the answer, and is not done; clients send some of them with values that ask for nothing.
_IGNORED = ("tools", "functions", "logit_bias", "frequency_penalty", "presence_penalty", "suffix")


class EditAsked(BaseModel):
    """One edit of the residual stream; `layer` is the server's where none is given."""

    model_config = ConfigDict(extra="forbid")
    vector: str
    kind: Literal["steer", "ablate", "cap", "floor"] = "steer"
    layer: int | None = None
    coef: Number | None = None
    dose: Number | None = None
    limit: Number | None = None
    positions: Literal["all", "prompt", "response"] = "all"


class Ours(BaseModel):
    """What no OpenAI server knows: a field that is not known here is an error, so that nothing is left undone."""

    model_config = ConfigDict(extra="forbid")
    edits: list[EditAsked] = Field(default=[], max_length=16)
    project: list[str] = Field(default=[], max_length=32)
    alarm: dict[str, Number] = Field(default={}, max_length=32)
    seconds: Number | None = Field(default=None, gt=0)


class _Common(BaseModel):
    model_config = ConfigDict(extra="allow")
    model: str
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=16)
    seed: int | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=16)
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    persona_vectors: Ours = Ours()

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value or []

    @field_validator("temperature", "top_p", "n", "stream", "persona_vectors", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    def check(self) -> None:
        """Raise InputError for what would change the answer and is not done here."""
        given = self.model_extra or {}
        asked = next((name for name in _IGNORED if given.get(name)), None)
        form = given.get("response_format")
        if asked is None and isinstance(form, dict) and form.get("type") != "text":
            asked = "response_format"
        if asked:
            raise InputError(f"{asked} is not supported: leave it out")


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """Return the role and the text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(_Common):
    """A request for /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens or 512

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are told; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsked(_Common):
    """A request for /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool = False

    @property
    def longest(self) -> int:
        """Most tokens of an answer."""
        return self.max_tokens or 16

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are told; None: no log-probabilities."""
        return self.logprobs


def read_request(kind: type[B], body: bytes) -> B:
    """Return a request's body; raises InputError, in one line, for what is no such request."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise InputError(f"{where or 'the body'}: {first['msg']}") from None
