"""A reward model that a server holds: ids go out, raw scores come back.

Serve a folder of ours with `vllm serve FOLDER --runner pooling --pooler-config
'{"use_activation": false}'`.  The folder is needed here too, if only without its weights: its
tokenizer and chat format make the ids, and its config.json normalises, in `RewardModel.score_each`.
"""

from dataclasses import dataclass
from typing import Any

from openai import APIConnectionError, APIStatusError, HttpxBinaryResponseContent, OpenAI
from pydantic import BaseModel, Field, ValidationError
from transformers import AutoModelForSequenceClassification

from starling.base.errors import DataError, InputError, ModelError, some
from starling.models.completion import clean
from starling.models.config import check_url
from starling.models.endpoint import Endpoint
from starling.models.loading import empty_model, load_codec
from starling.models.reward_model import RewardModel, Rows, reward_config, stored_reading

SEQUENCES_PER_CALL = 64


class _Class(BaseModel):
    index: int
    probs: list[float] = Field(min_length=1, max_length=1)


class _Classes(BaseModel):
    data: list[_Class]


class Classifier(Endpoint):
    """A served sequence classifier with one label.

    Time-outs, broken connections, 408, 409, 429 and 5xx are tried again, `retries` times, with
    waits that double or that the server names: a score that is asked for twice costs nothing.
    """

    def classify(self, sequences: list[list[int]]) -> list[float]:
        """The raw score of each; raises InputError or DataError for anything but that."""
        address = self.url.removesuffix("/v1") + "/classify"
        # `probs` are raw scores only without the activation, which is the server's default.
        body = {"model": self.model, "input": sequences, "use_activation": False}
        options = {**self._options(self._timeout_seconds), "max_retries": self._retries}
        try:
            with OpenAI(**options) as client:
                reply = client.post(address, body=body, cast_to=HttpxBinaryResponseContent).content
        except APIConnectionError as error:
            said = self._clean(str(error.__cause__ or error))
            raise InputError(
                f"{address} gave no answer in {self._retries + 1} attempts ({said}); start the "
                "server, or check the address"
            ) from error
        except APIStatusError as error:
            said = f"{address} answered {error.status_code}: {self._clean(error.message)}"
            if error.status_code == 401:
                raise self._key_refused(said) from error
            raise InputError(
                f"{said}. Check the address and the model's name, and that it is served with "
                "--runner pooling"
            ) from error
        try:
            found = {item.index: item.probs[0] for item in _Classes.model_validate_json(reply).data}
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
        return [found[number] for number in range(len(sequences))]


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
                    f"{some(sorted(map(clean, served)), 20) or 'none'}. Name the reward model with "
                    "--served-model NAME."
                )
            served_model = served[0]
        codec = load_codec(reference, config, None)
        model = empty_model(AutoModelForSequenceClassification, "sequence classifier", config)
        classifier = Classifier(url, served_model, **known)
        return ServedRewardModel(model, codec, **reading, classifier=classifier)

    def raw_scores(self, rows: Rows) -> list[list[float]]:
        """Scores as the server gives them, of every row's encoded conversations."""
        flat = [list(ids) for row in rows for ids in row]
        parts = (flat[i : i + SEQUENCES_PER_CALL] for i in range(0, len(flat), SEQUENCES_PER_CALL))
        scores = (score for part in parts for score in self.classifier.classify(part))
        return [[next(scores) for _ in row] for row in rows]
