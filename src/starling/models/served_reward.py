"""A reward model that a server holds: ids go out, raw scores come back.

Serve a folder of ours with `vllm serve FOLDER --runner pooling --pooler-config
'{"use_activation": false}'`.  The folder is needed here too, if only without its weights: its
tokenizer and chat format make the ids, and its config.json normalises, in `RewardModel.score_each`.
"""

import logging
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from openai import APIConnectionError, APIStatusError, HttpxBinaryResponseContent, OpenAI
from pydantic import BaseModel, Field, ValidationError
from transformers import AutoModelForSequenceClassification

from starling.base.errors import DataError, InputError, ModelError, some
from starling.data.records import Message
from starling.models.completion import clean
from starling.models.config import check_url
from starling.models.endpoint import Endpoint
from starling.models.loading import empty_model, load_codec
from starling.models.reward_model import RewardModel, Rows, Scored, reward_config, stored_reading

logger = logging.getLogger(__name__)

SEQUENCES_PER_CALL = 64

GREETING = Scored(
    (Message(role="user", content="Hi"), Message(role="assistant", content="Hello.")),
    id="a greeting",
)
"""Scored once on connecting, so that a server that cannot is told before any work."""

OneNumber = Annotated[list[float], Field(min_length=1, max_length=1)]


class _Classified(BaseModel):
    index: int
    probs: OneNumber

    def score(self, num_tokens: int) -> float:
        return self.probs[0]


class _Pooled(BaseModel):
    index: int
    data: OneNumber

    def score(self, num_tokens: int) -> float:
        return self.data[0]


class _PooledTokens(BaseModel):
    index: int
    data: list[OneNumber]

    def score(self, num_tokens: int) -> float:
        """That at the last token, where our classifier reads."""
        if len(self.data) != num_tokens:
            raise DataError(
                f"the server gave {len(self.data)} scores for a conversation of {num_tokens} "
                "tokens; does it cut, or add tokens of its own?"
            )
        return self.data[-1][0]


class _Classes(BaseModel):
    data: list[_Classified]


class _Pools(BaseModel):
    data: list[_Pooled]


class _TokenPools(BaseModel):
    data: list[_PooledTokens]


class Shape(NamedTuple):
    """A way to ask for scores, and the form of its reply."""

    name: str
    route: str
    settings: dict[str, str]
    form: type[_Classes] | type[_Pools] | type[_TokenPools]


# vllm/entrypoints/pooling/{classify,pooling}/protocol.py.  /score takes pairs of texts, not ids.
SHAPES = (
    Shape("/classify", "/classify", {}, _Classes),
    Shape("/pooling, task classify", "/pooling", {"task": "classify"}, _Pools),
    Shape("/pooling, task token_classify", "/pooling", {"task": "token_classify"}, _TokenPools),
)
NOT_IN_THIS_SHAPE = (400, 404, 405, 501)
"""How versions of vLLM refuse a route or a task that the model has not."""


class Classifier(Endpoint):
    """A served sequence classifier with one label.

    The first call finds which of vLLM's shapes the server takes; later ones keep to it.  Time-outs,
    broken connections, 408, 409, 429 and 5xx are tried again, `retries` times, with waits that
    double or that the server names: a score that is asked for twice costs nothing.
    """

    _shapes = SHAPES

    def classify(self, sequences: list[list[int]]) -> list[float]:
        """The raw score of each; raises InputError or DataError for anything but that."""
        refusals = []
        for shape in self._shapes:
            try:
                reply = self._send(shape, sequences)
            except APIStatusError as error:
                address = self._address(shape)
                said = f"{address} answered {error.status_code}: {self._clean(error.message)}"
                if error.status_code == 401:
                    raise self._key_refused(said) from error
                refusals.append(said)
                if error.status_code not in NOT_IN_THIS_SHAPE:
                    break
                continue
            scores = self._read(shape, reply, sequences)
            if len(self._shapes) > 1:
                logger.info("%s: scores come from %s", self.url, shape.name)
                self._shapes = (shape,)
            return scores
        raise InputError(
            f"{'; '.join(refusals)}. Check the address and the model's name, and that it is served "
            "with --runner pooling; then run this again"
        )

    def _address(self, shape: Shape) -> str:
        return self.url.removesuffix("/v1") + shape.route

    def _send(self, shape: Shape, sequences: list[list[int]]) -> bytes:
        # What comes are raw scores only without the activation, which is the server's default.
        body = {"model": self.model, "input": sequences, "use_activation": False, **shape.settings}
        options = {**self._options(self._timeout_seconds), "max_retries": self._retries}
        address = self._address(shape)
        try:
            with OpenAI(**options) as client:
                return client.post(address, body=body, cast_to=HttpxBinaryResponseContent).content
        except APIConnectionError as error:
            said = self._clean(str(error.__cause__ or error))
            raise InputError(
                f"{address} gave no answer in {self._retries + 1} attempts ({said}); start the "
                "server, or check the address, then run this again"
            ) from error

    def _read(self, shape: Shape, reply: bytes, sequences: list[list[int]]) -> list[float]:
        address = self._address(shape)
        try:
            found = {item.index: item for item in shape.form.model_validate_json(reply).data}
        except ValidationError as error:
            [first, *_] = error.errors(include_url=False, include_context=False)
            where = ".".join(map(str, first["loc"])) or "the reply"
            raise DataError(
                f"{address} gave something else than one score for each conversation ({where}: "
                f"{first['msg']}); serve a reward model with one label, by vLLM"
            ) from error
        if sorted(found) != list(range(len(sequences))):
            raise DataError(
                f"{address} was asked for {len(sequences)} scores and gave number "
                f"{some([*map(str, sorted(found))], 8) or 'none'}; is it vLLM?"
            )
        return [found[number].score(len(ids)) for number, ids in enumerate(sequences)]


@dataclass(frozen=True, kw_only=True)
class ServedRewardModel(RewardModel):
    """A reward model whose raw scores a server computes; `model` has no weights."""

    classifier: Classifier

    @staticmethod
    def connect(
        url: str,
        reference: str,
        *,
        served_model: str | None = None,
        api_key_env: str | None = None,
        timeout_seconds: float = 100.0,
        retries: int = 5,
    ) -> "ServedRewardModel":
        """The one model at `url`, or its `served_model`; read as the folder `reference` says.

        Raises InputError for an address, a key or a server that cannot be used.
        """
        try:
            check_url(url)
        except ValueError as error:
            raise InputError(f"the address of the reward model: {error}") from error
        config = reward_config(reference)
        reading = stored_reading(config)
        if reading["read_out"] != "last_token":
            raise ModelError(
                f"{reference}: its scores are read in padding ({reading['read_out']}), which no "
                "server does; score with the folder itself"
            )
        url = url.rstrip("/").removesuffix("/v1") + "/v1"
        known: dict[str, Any] = {
            "api_key_env": api_key_env,
            "timeout_seconds": timeout_seconds,
            "retries": retries,
        }
        if served_model is None:
            served = Classifier(url, "", **known).served_models()
            if len(served) != 1:
                raise InputError(
                    f"{url} serves {len(served)} models: "
                    f"{some(sorted(map(clean, served)), 20) or 'none'}. Name the reward model: "
                    "--served-model NAME, or served_model in the recipe."
                )
            served_model = served[0]
        codec = load_codec(reference, config, None)
        model = empty_model(AutoModelForSequenceClassification, "sequence classifier", config)
        classifier = Classifier(url, served_model, **known)
        connected = ServedRewardModel(model, codec, **reading, classifier=classifier)
        connected.score([GREETING])
        return connected

    def raw_scores(self, rows: Rows) -> list[list[float]]:
        """Scores as the server gives them, of every row's encoded conversations."""
        flat = [list(ids) for row in rows for ids in row]
        parts = (flat[i : i + SEQUENCES_PER_CALL] for i in range(0, len(flat), SEQUENCES_PER_CALL))
        scores = (score for part in parts for score in self.classifier.classify(part))
        return [[next(scores) for _ in row] for row in rows]
