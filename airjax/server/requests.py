"""What clients may send. A field that is not named here, or that nothing stands behind yet, is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from airjax.api import Engine
from airjax.server.errors import ApiError
from airjax.server.sampler import DRY_BREAKERS, Settings, biases, tokens_with

Count = Annotated[StrictInt, Field(ge=1, le=1 << 31)]
TokenId = Annotated[StrictInt, Field(ge=0, le=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Text = Annotated[StrictStr, Field(min_length=1)]
Stop = Text | Annotated[list[Text], Field(max_length=4)]
Prompt = (
    StrictStr
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[StrictStr], Field(min_length=1)]
)
Prompts = Prompt | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]

# Names that clients know from OpenAI or llama.cpp, with the value that asks for nothing.
_NOT_BUILT: dict[str, Any] = {
    "suffix": "",
}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Model):
    """How a stream is sent."""

    include_usage: StrictBool = False


class JsonSchema(_Model):
    """The schema that the text must satisfy."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    name: StrictStr | None = None
    description: StrictStr | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(_Model):
    """Which form the text must have; `schema` beside json_object is llama.cpp's own."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    plain_schema: dict[str, Any] | None = Field(None, alias="schema")


class _Generation(_Model):
    """What chat and completion have in common."""

    model: StrictStr | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[StrictInt, Field(ge=-1, le=4096)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=128)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[StrictStr, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_n_sigma: Annotated[Number, Field(ge=-1, le=100)] | None = None
    dry_multiplier: Annotated[Number, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[Number, Field(ge=1, le=100)] | None = None
    dry_allowed_length: Annotated[StrictInt, Field(ge=1, le=4096)] | None = None
    dry_penalty_last_n: Annotated[StrictInt, Field(ge=-1, le=4096)] | None = None
    dry_sequence_breakers: Annotated[list[Text], Field(max_length=64)] | None = None
    xtc_probability: Annotated[Number, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    dynatemp_range: Annotated[Number, Field(ge=0, le=2)] | None = None
    dynatemp_exponent: Annotated[Number, Field(gt=0, le=100)] | None = None
    mirostat: Annotated[StrictInt, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[Number, Field(ge=0, le=100)] | None = None
    mirostat_eta: Annotated[Number, Field(ge=0, le=1)] | None = None
    grammar: StrictStr | None = None

    def settings(self, engine: Engine) -> Settings:
        """How tokens are drawn.

        Raises:
          ApiError: a bias is on what is no token.
        """
        special = {"logit_bias", "dry_sequence_breakers"}
        names = [name for name in Settings.__dataclass_fields__ if name not in special]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = biases(self.logit_bias, engine.model.config.vocab_size)
        if self.dry_multiplier:
            breakers = self.dry_sequence_breakers
            texts = DRY_BREAKERS if breakers is None else tuple(breakers)
            given["dry_sequence_breakers"] = tokens_with(engine.tokenizer, texts)
        return Settings(**given)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_built(self) -> None:
        """Refuses what nothing stands behind yet.

        Raises:
          ApiError: names the field.
        """
        for name, nothing in _NOT_BUILT.items():
            value = getattr(self, name, None)
            if value is not None and value != nothing:
                raise ApiError(400, f"{name} is not supported by this server yet: leave it out", name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options may be given only with stream", "stream_options")


class FunctionCall(_Model):
    """A call that the assistant made in an earlier turn."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(_Model):
    """A tool call of an earlier turn."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: FunctionCall


class TextPart(_Model):
    """A piece of a message."""

    type: Literal["text"]
    text: StrictStr


class Message(_Model):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    refusal: StrictStr | None = None


class Function(_Model):
    """A function that the model may call."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Model):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(_Model):
    """Names a function."""

    name: StrictStr


class NamedTool(_Model):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Generation):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None

    @property
    def forced(self) -> str:
        """The function that must be called, "*" for any, "" for none."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        return "*" if self.tool_choice == "required" else ""


class CompletionRequest(_Generation):
    """The body of `/v1/completions`."""

    prompt: Prompts
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    suffix: StrictStr | None = None
    best_of: Count | None = None


class EmbeddingRequest(_Model):
    """The body of `/v1/embeddings`."""

    input: Prompts
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: StrictStr | None = None


class TokenizeRequest(_Model):
    """The body of `/tokenize`."""

    content: StrictStr
    add_special: StrictBool = False
    parse_special: StrictBool = True


class DetokenizeRequest(_Model):
    """The body of `/detokenize`."""

    tokens: list[TokenId]


class TemplateRequest(_Model):
    """The body of `/apply-template`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: list[Tool] | None = None
