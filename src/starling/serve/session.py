"""`Chat`: one model, wherever it is, that answers conversations; the terminal and Python use it.

What needs torch is imported where a model is loaded: a server's model is talked to without it.
"""

import logging
import math
import os
import re
from collections.abc import Generator, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from starling.base.errors import DataError, InputError
from starling.base.explain import explain
from starling.base.seeding import derive_seed
from starling.data.records import Conversation, Message, Prompt
from starling.models.config import EndpointSection
from starling.models.endpoint import Endpoint
from starling.models.interfaces import (
    Failure,
    Reply,
    Request,
    Sampling,
    StreamingResponder,
    returned,
)
from starling.serve.find import find_mode, only_served_model, resolve_model

if TYPE_CHECKING:
    from starling.data.chat import ChatCodec
    from starling.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

URL = re.compile(r"https?://")
# How vLLM, llama.cpp and OpenAI word that a prompt is too long.
CONTEXT_REFUSED = re.compile(r"context[ _](length|size|window)", re.IGNORECASE)


@dataclass
class Chat:
    """A model to talk to.  Its settings may be changed between answers.

    The n-th answer of a Chat draws from its own random stream, so the same questions to a new Chat
    with the same settings get the same answers.
    """

    model: str
    """Run folder (its ppo model, else its sft model), model folder, hub id, .gguf file, or URL of a
    server."""
    _: KW_ONLY
    mode: str | None = None
    """One of the chat format's modes, or its beginning: code, math; absent, the format's first."""
    system: str | None = None
    """System message of conversations that have none."""
    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int = 512
    """Longest answer, in tokens."""
    seed: int = 0
    """Another seed draws other answers."""
    best_of: int = 1
    """How many answers to draw for the reward model to pick one from."""
    reward_model: str | None = None
    """Its folder or hub id; absent, the run folder's own."""
    device: str | None = None
    """cpu, cuda or cuda:<number>; absent, a GPU where there is one."""
    dtype: str | None = None
    """Of the weights: float32, bfloat16 or float16; absent, as they are stored."""
    chat_format: str | None = None
    """Name of the chat format, where it is not the model's own."""
    served_model: str | None = None
    """Name of the model at the URL; absent, the one that it serves."""
    api_key_env: str | None = None
    """Environment variable that holds the URL's key."""
    tokenizer: str | None = None
    """Folder or hub id of the model at the URL, or openchat: its chat format is then applied here,
    with its modes, and token ids are sent; absent, messages are sent."""

    def __post_init__(self) -> None:
        self._codec: ChatCodec | None = None
        self._context_length: int | None = None
        self._judge: RewardModel | None = None
        self._num_answers = 0
        self._num_left_out = 0
        self.model = os.fspath(self.model)
        self._check()
        self._responder = self._connect() if URL.match(self.model) else self._load()
        if self.best_of > 1:
            self._load_judge()
        self.mode = self._find_mode(self.mode)

    def reply(self, messages: object, *, mode: str | None = None) -> str:
        """The answer to a text, or to a list of {"role", "content"} that ends with the user's.

        Raises DataError for messages that are none, for a conversation that cannot fit, and when a
        server fails.
        """
        return returned(self.stream(messages, mode=mode)).text

    def stream(self, messages: object, *, mode: str | None = None) -> Generator[str, None, Reply]:
        """Yield the answer piece by piece, best-of-n all at once, and return the whole reply.

        Closing the generator stops the answer.  Exchanges that no longer fit are left out, oldest
        first, and a warning says so.
        """
        self._check()
        asked = read_messages(messages)
        if asked[-1].role != "user":
            raise DataError("the last message is the assistant's; the user's must come last")
        if self.system and asked[0].role != "system":
            asked = (Message(role="system", content=clean(self.system)), *asked)
        self._num_answers += 1
        request = self._fitting(Request("chat", asked, self._sampling(0), self._find_mode(mode)))
        while True:
            self._tell_left_out(len(asked) - len(request.messages))
            try:
                return (yield from self._answer(request))
            except DataError as error:
                shorter = self._after_refusal(request, error)
                if shorter is None:
                    raise
                request = shorter

    def change(self, name: str, value: Any) -> None:
        """Set a setting; raises InputError for an impossible value, and then nothing changed."""
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            self._check()
            self.mode = self._find_mode(self.mode)
            if self.best_of > 1:
                self._load_judge()
        except BaseException:  # Ctrl-C too: loading a reward model takes its time
            setattr(self, name, before)
            raise

    @property
    def sampling_temperature(self) -> float:
        """The temperature, for best-of-n at least 1 where it is 0: greedy answers are all one."""
        return 1.0 if self.best_of > 1 and self.temperature == 0 else self.temperature

    @property
    def modes(self) -> tuple[str, ...]:
        """The chat format's modes; a server's are not known."""
        return () if self._codec is None else self._codec.format.modes

    def _check(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if not isinstance(value, float | int if kind is float else kind):  # type: ignore[arg-type]
                named = getattr(kind, "__name__", kind)
                raise InputError(f"{field.name} is {value!r}; it must be a {named}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"the temperature is {self.temperature}; it must be 0 (greedy) or above"
            )
        for name in ("max_tokens", "best_of"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        of_urls = ("served_model", "api_key_env", "tokenizer")
        is_url = bool(URL.match(self.model))
        foreign = ("device", "dtype") if is_url else of_urls
        for name in foreign:
            if getattr(self, name) is not None:
                kind = "a model in this process" if is_url else "a server's URL"
                raise InputError(f"{name} is for {kind}, and the model is {self.model}")
        if self.model.endswith(".gguf") and (self.device or self.dtype):
            raise InputError(
                "device and dtype are not for a GGUF file: it runs as it is, on the CPU"
            )
        if is_url and self.chat_format is not None and self.tokenizer is None:
            raise InputError("chat_format, with a URL, needs the served model's tokenizer")

    def _connect(self) -> StreamingResponder:
        try:
            section = EndpointSection.model_validate(
                {"url": self.model, "api_key_env": self.api_key_env}
            )
        except ValidationError as error:
            raise InputError("\n".join(explain(error, EndpointSection))) from error
        if self.tokenizer is not None:
            from starling.models.codec import find_codec

            self._codec = find_codec(resolve_model(self.tokenizer), self.chat_format)
        # Who waits for a slow server can press Ctrl-C.
        return Endpoint(
            self.model,
            self.served_model or only_served_model(self.model, section.api_key_env),
            codec=self._codec,
            api_key_env=self.api_key_env,
            timeout_seconds=600.0,
            retries=2,
        )

    def _load(self) -> StreamingResponder:
        from starling.base.context import choose_device

        reference = resolve_model(self.model)
        if self.reward_model is None and reference != self.model:
            own = Path(self.model) / "reward" / "model"
            self.reward_model = str(own) if own.is_dir() else None
        device = choose_device(self.device)
        if reference.endswith(".gguf"):
            from starling.models.gguf_engine import load_gguf

            local = load_gguf(reference, chat_format=self.chat_format)
        else:
            from starling.models.causal_lm import load_language_model
            from starling.models.loading import count_parameters, load_config
            from starling.models.local import in_process

            # Said before the weights are read: of a large model that takes its time.
            size = count_parameters(load_config(reference))
            logger.info("[%s: a model of %s parameters]", reference, f"{size:,}")
            loaded = load_language_model(
                reference, device=device, dtype=self.dtype or "auto", chat_format=self.chat_format
            )
            local = in_process(loaded, identity=reference)
        self._codec, self._context_length = local.codec, local.context_length
        return local

    def _load_judge(self) -> "RewardModel":
        if self._judge is None:
            if self.reward_model is None:
                raise InputError(
                    "best-of needs a reward model to pick the answer: name one with "
                    "--reward-model FOLDER, or chat with a run folder that has reward/model"
                )
            from starling.base.context import choose_device
            from starling.models.reward_model import RewardModel

            self._judge = RewardModel.load(
                self.reward_model, device=choose_device(self.device), dtype=self.dtype or "auto"
            )
        return self._judge

    def _find_mode(self, mode: str | None) -> str | None:
        wanted = mode or self.mode
        if wanted is not None and not isinstance(wanted, str):
            raise DataError(f"the mode is {wanted!r}; it must be a text such as Code")
        if self._codec is not None:
            return find_mode(self._codec, wanted)
        if wanted is not None:
            raise DataError(
                f"mode {wanted!r}: the server is sent messages, which have no mode; name the "
                "tokenizer of the model that it serves (--tokenizer openchat, or a folder)"
            )
        return None

    def _sampling(self, number: int) -> Sampling:
        seed = derive_seed(self.seed, "chat", self._num_answers, number)
        return Sampling(self.max_tokens, self.sampling_temperature, seed)

    def _fitting(self, request: Request) -> Request:
        """The request with whole exchanges left out, and the answer limited, so that both fit."""
        if self._codec is None or self._context_length is None:
            return request
        from starling.models.local import trim_turns

        kept_free = min(self.max_tokens, self._context_length // 2)
        limit = self._context_length - kept_free
        messages = trim_turns(request.messages, self._codec, limit=limit, mode=request.mode)
        prompt = self._codec.encode(messages, mode=request.mode, generation_prompt=True).ids
        room = self._context_length - len(prompt)
        if room < 1:
            raise DataError(
                f"the message makes a prompt of {len(prompt)} tokens, which do not fit the model's "
                f"{self._context_length} positions with an answer; shorten it"
            )
        sampling = replace(request.sampling, max_tokens=min(self.max_tokens, room))
        return replace(request, messages=messages, sampling=sampling)

    def _answer(self, request: Request) -> Generator[str, None, Reply]:
        if self.best_of > 1:
            from starling.models.best_of import best_of

            group = [
                replace(
                    request,
                    id=f"chat/{number}",
                    sampling=replace(
                        self._sampling(number), max_tokens=request.sampling.max_tokens
                    ),
                )
                for number in range(self.best_of)
            ]
            [reply] = best_of([group], self._responder, self._load_judge())
            yield reply.text
            return reply
        outcome = yield from self._responder.stream(request)
        if isinstance(outcome, Failure):
            raise DataError(f"no answer: {outcome.reason}")
        return outcome

    def _after_refusal(self, request: Request, error: DataError) -> Request | None:
        """What to ask a server that says the context is full; None where that is not the reason."""
        if self._context_length is not None or not CONTEXT_REFUSED.search(str(error)):
            return None
        from starling.models.local import drop_oldest

        messages = drop_oldest(request.messages)
        return None if messages is None else replace(request, messages=messages)

    def _tell_left_out(self, count: int) -> None:
        if count not in (0, self._num_left_out):
            logger.warning("[the context is full: the first %d messages are left out]", count)
        self._num_left_out = count


def read_messages(found: object) -> tuple[Message, ...]:
    """A conversation from outside: a text, or a list of messages; DataError says what is wrong.

    Halves of surrogate pairs, which no tokenizer takes, are replaced: bytes that are no UTF-8
    arrive as such.
    """
    rows = [{"role": "user", "content": found}] if isinstance(found, str) else found
    if not isinstance(rows, list | tuple):
        raise DataError(
            "messages must be a list of {'role': ..., 'content': ...}; found "
            f"{type(found).__name__}"
        )
    plain = [row.model_dump() if isinstance(row, Message) else row for row in rows]
    last = plain[-1] if plain else None
    is_answered = isinstance(last, Mapping) and last.get("role") == "assistant"
    record = Conversation if is_answered else Prompt
    try:
        return record.model_validate({"messages": [_clean_row(row) for row in plain]}).messages
    except ValidationError as error:
        raise DataError("; ".join(explain(error, record))) from error


def _clean_row(row: object) -> object:
    if not isinstance(row, Mapping):
        return row
    return {
        key: clean(value) if isinstance(value, str) else value
        for key, value in row.items()
        if key in ("role", "content")
    }


def clean(text: str) -> str:
    """The text with halves of surrogate pairs replaced."""
    return text.encode("utf-8", "replace").decode()
