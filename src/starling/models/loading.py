"""Read a model folder or hub id with care: its config, its weights, its chat format.

Never remote code, never pickle.  What transformers would pass over in silence (weights made up at
random, a template that writes another format, an end marker that is no end) is refused or said,
with what to do.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from starling.base.errors import ModelError, some
from starling.data.chat import FORMATS, ChatCodec, build_codec, jinja_template
from starling.data.tokenizer import TextTokenizer, find_file, load_tokenizer

logger = logging.getLogger(__name__)

# Starling shows one progress line of its own.
transformers_logging.disable_progress_bar()
# Without it, transformers asks a bot to open a pull request in a repository that has only pickles.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

DTYPES = ("float32", "bfloat16", "float16", "auto")

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Trainers leave these beside a model; they hold no weights of it.
SIDE_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
# Buffers that older programs stored, and the head that a classifier does without.
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^lm_head\.weight$")
_TURNS = [
    {"role": role, "content": text}
    for role, text in (("user", "Hello"), ("assistant", "Hi"), ("user", "How are you?"))
]


def load_config(reference: str) -> PretrainedConfig:
    """Read config.json; raises ModelError for code of its own, pickles, or what cannot be read."""
    _refuse_other_files(reference)
    try:
        stored, _ = PretrainedConfig.get_config_dict(reference)
        named = stored.get("auto_map")
        config = None if named else AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # transformers raises anything for what it did not write
        raise ModelError(f"{reference}: no usable config.json ({error})") from error
    if config is None:
        raise ModelError(
            f"{reference}: config.json asks for code of its own (auto_map: {json.dumps(named)}), "
            f"which is never run; if transformers knows {stored.get('model_type')!r} models by "
            "itself, remove auto_map, else use another model"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{reference}: the weights are quantised ({kind}), which is not supported; use the "
            "model it was made from, or a GGUF file with starling chat"
        )
    _check_config(reference, config)
    return config


def _check_config(reference: str, config: PretrainedConfig) -> None:
    """Refuse what transformers leaves to whoever reads it."""
    rows: Any = getattr(config.get_text_config(), "vocab_size", None)
    named: Any = config.architectures
    stored: Any = getattr(config, "starling_chat_format", None)
    dtype: Any = config.dtype
    right = {
        "vocab_size": type(rows) is int and rows > 0,
        "architectures": named is None
        or (isinstance(named, list) and all(isinstance(name, str) for name in named)),
        "starling_chat_format": stored is None or isinstance(stored, str),
        "dtype": dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point),
    }
    if wrong := [key for key, is_right in right.items() if not is_right]:
        raise ModelError(
            f"{reference}: config.json has no usable {', '.join(wrong)}; download or save the "
            "model again"
        )


def _refuse_other_files(reference: str) -> None:
    """Refuse a path without a folder, or whose only weights are pickles or GGUF, by their names."""
    path = Path(reference)
    if not path.exists() and (reference.startswith((".", "/")) or reference.count("/") > 1):
        raise ModelError(f"{reference}: there is no such folder; a hub id is owner/name")
    files = [path] if path.is_file() else sorted(path.glob("*"))
    if any(file.suffix == ".safetensors" for file in files):
        return
    if found := [file.name for file in files if file.suffix == ".gguf"]:
        raise ModelError(
            f"{reference}: found only {some(found, 3)}: GGUF is for chatting alone; "
            "run starling chat FILE, or use the model it was made from"
        )
    found = [f.name for f in files if f.suffix in PICKLES and f.name not in SIDE_FILES]
    if found:
        raise ModelError(
            f"{reference}: found only {some(found, 3)}: pickles can run code and are not opened; "
            "get or save the model as safetensors (a published reward checkpoint is converted by "
            "python -m starling.models.published_reward)"
        )
    if path.is_file():
        raise ModelError(f"{reference}: this is a file; name a model folder or a hub id")


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the causal language model that `config` describes; none is allocated.

    Raises ModelError for a config of something else.
    """
    return empty_model(AutoModelForCausalLM, "causal language model", config).num_parameters()


def empty_model(factory: Any, kind: str, config: PretrainedConfig) -> Any:
    """The `factory`'s model that `config` describes, without memory for its weights."""
    if type(config) not in factory._model_mapping:
        raise ModelError(
            f"a {config.model_type} is no {kind} that transformers knows; use another model"
        )
    try:
        with torch.device("meta"):
            return factory.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's own code meets the config's values
        raise ModelError(
            f"config.json describes no {config.model_type} that can be built ({error!r}); download "
            "or save the model again"
        ) from error


def load_weights(
    factory: Any,
    reference: str,
    config: PretrainedConfig,
    dtype: str,
    *,
    new_weights: frozenset[str] = frozenset(),
) -> Any:
    """Load safetensors into `factory`'s model; every parameter but `new_weights` must be there.

    `dtype` is a name of DTYPES; auto keeps the stored one.  Raises ModelError.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)} (as stored)")
    # transformers' own report says less than the messages below.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        _check_files(reference, config)
        model, found = factory.from_pretrained(
            reference,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # a model's own code meets the config's values and the files
        if "use_safetensors" in str(error):
            raise ModelError(
                f"{reference}: the hub has no safetensors of it, and pickles are not opened; use a "
                "copy that was converted, or download and convert it"
            ) from error
        raise ModelError(
            f"{reference}: the weights cannot be read ({error}); copy or save the model again"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_loaded(reference, type(model).__name__, found, new_weights)
    return model


def _check_files(reference: str, config: PretrainedConfig) -> None:
    """Refuse a folder without safetensors, and a config or an index that names other files."""
    folder = Path(reference)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(f"{reference}: found no weights; save the model as safetensors")
    named = {getattr(config, "transformers_weights", None) or ""}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            named |= set(
                json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise ModelError(f"{index}: damaged ({error}); get it again") from error
    if pickles := sorted(name for name in named if name.endswith(PICKLES)):
        raise ModelError(f"{reference}: names {some(pickles, 3)} as weights; pickles can run code")


def _check_loaded(
    reference: str, kind: str, found: dict[str, Any], new_weights: frozenset[str]
) -> None:
    """Refuse weights that config.json does not fit; transformers would put random numbers there."""
    advice = "config.json and the weights do not belong together; download or save the model again"
    if missing := sorted(set(found["missing_keys"]) - new_weights):
        raise ModelError(f"{reference}: the weights lack {some(missing, 3)}; {advice}")
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{reference}: {name} is {list(stored)} in the weights and {list(wanted)} by "
            f"config.json; {advice}"
        )
    unknown = sorted(name for name in found["unexpected_keys"] if not _HARMLESS.search(name))
    if heads := [name for name in unknown if name.startswith("v_head.")]:
        logger.warning("%s: the value head (%s) is left out", reference, some(heads, 3))
    if others := [name for name in unknown if name not in heads]:
        raise ModelError(
            f"{reference}: a {kind} has no place for {some(others, 3)}, which the weights hold; "
            f"{advice}"
        )


def load_codec(reference: str, config: PretrainedConfig, chat_format: str | None) -> ChatCodec:
    """The chat codec of a model folder or hub id; its pad token becomes `config`'s.

    The format is `chat_format`, or the one that Starling stored, or that of the vocabulary's
    markers, or the model's own template.  A template that contradicts the format is refused unless
    `chat_format` says whom to believe.
    """
    tokenizer = load_tokenizer(reference)
    stored: Any = getattr(config, "starling_chat_format", None)
    name = choose_format(reference, tokenizer, chat_format, stored)
    stop_ids = _stop_ids(reference, config)
    check_vocabulary(reference, config, tokenizer)
    named_pad = tokenizer.saved.pad_token_id
    codec = build_codec(name, tokenizer, stop_ids)
    # As that of Starling-LM-7B-beta does; where the tokenizer names it too, that has been said.
    if config.pad_token_id == codec.end_id != named_pad:
        logger.warning(
            "%s: config.json pads with the end marker (%d), which would hide ends from training; "
            "Starling pads with %d, and saves that",
            reference,
            codec.end_id,
            tokenizer.pad_id,
        )
    _check_end(reference, codec, stop_ids)
    # Also because the embedding of config's pad token is never trained.
    config.pad_token_id = tokenizer.pad_id
    return codec


def _stop_ids(reference: str, config: PretrainedConfig) -> list[int]:
    """The ends of generation_config.json, or where that is absent or names none, config.json's."""
    stops: Any = None
    if path := find_file(reference, "generation_config.json"):
        try:
            stops = json.loads(Path(path).read_text(encoding="utf-8")).get("eos_token_id")
        except (AttributeError, OSError, ValueError) as error:
            raise ModelError(
                f"{reference}: generation_config.json is damaged ({error}); get it again, or "
                "remove it: config.json's end of sequence then stands"
            ) from error
    stops = config.eos_token_id if stops is None else stops
    ends = [] if stops is None else stops if isinstance(stops, list) else [stops]
    rows = config.get_text_config().vocab_size
    if wrong := [end for end in ends if type(end) is not int or not 0 <= end < rows]:
        raise ModelError(
            f"{reference}: eos_token_id is {wrong[0]!r}, which is no id of the vocabulary "
            f"(0 to {rows - 1}); correct it in generation_config.json or config.json"
        )
    return ends


def choose_format(
    reference: str, tokenizer: TextTokenizer, wanted: str | None, stored: str | None = None
) -> str:
    """The format `wanted`, or `stored`, or OpenChat by its marker, else the model's own template,
    else ChatML by its markers.  A template is checked unless the format is `wanted`.
    """
    guessed = "chatml" if tokenizer.marker_id("<|im_end|>") is not None else None
    if tokenizer.marker_id("<|end_of_turn|>") is not None:
        guessed = "openchat"
    elif tokenizer.saved.chat_template:
        guessed = "template"
    name = wanted or stored or guessed
    if name is None:
        raise ModelError(
            f"{reference}: the chat format is not known; set chat_format to one of "
            f"{', '.join(FORMATS)}"
        )
    if wanted is None and name.startswith("openchat"):
        _check_template(reference, name, tokenizer)
    return name


def _check_template(reference: str, name: str, tokenizer: TextTokenizer) -> None:
    """Refuse a stored template that writes user and assistant turns unlike format `name`."""
    saved = tokenizer.saved
    if not saved.chat_template:
        logger.warning("%s: no chat template is stored; %s is used", reference, name)
        return

    def rendered(template: str | None) -> str:
        try:
            text = saved.apply_chat_template(
                _TURNS, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program, and fails in all their ways
            return f"an error: {str(error) or type(error).__name__}"
        return str(text).removeprefix(str(saved.bos_token or ""))

    theirs, ours = rendered(None), rendered(jinja_template(FORMATS[name]))
    if theirs != ours:
        raise ModelError(
            f"{reference}: the stored chat template writes {theirs!r} where the {name} format "
            f"writes {ours!r}; set chat_format to {name} (copied templates are often wrong) or to "
            "template (believe the folder)"
        )


def check_vocabulary(reference: str, config: PretrainedConfig, tokenizer: TextTokenizer) -> None:
    """Refuse a tokenizer with an id beyond the embedding's rows; more rows than ids are fine."""
    rows = config.get_text_config().vocab_size
    token, highest = max(tokenizer.saved.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise ModelError(
            f"{reference}: the tokenizer's highest id is {highest} ({token}) and the embedding has "
            f"{rows} rows; the tokenizer and the weights do not belong together"
        )


def _check_end(reference: str, codec: ChatCodec, stop_ids: list[int]) -> None:
    """Say that answers end with a marker which ends nothing elsewhere.

    The stored ends stay stops: a model that writes one has left the conversation.
    """
    if codec.end_id not in stop_ids:
        name: Any = codec.tokenizer.saved.convert_ids_to_tokens
        logger.warning(
            "%s: the end of sequence is %s, but answers end with %s (%d): Starling stops at "
            "either, other programs would not stop; saving with Starling repairs it",
            reference,
            ", ".join(map(str, name(stop_ids))) or "not set",
            name(codec.end_id),
            codec.end_id,
        )
