"""Which of a model's weights learn: all, the top layers, the head, or LoRA adapters and the head.

LoRA is peft's, put into the model in place, so that the model stays transformers' own class.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from starling.base.errors import InputError, RecipeError
from starling.models.reward_model import score_head

logger = logging.getLogger(__name__)


@runtime_checkable
class TrainSettings(Protocol):
    """What the section of a stage that can train a part of its model has."""

    train: Literal["full", "top", "head", "lora"]
    top_layers: int
    lora_rank: int
    lora_alpha: float


def choose_parameters(
    model: PreTrainedModel, section: TrainSettings, *, seed: int = 0
) -> PreTrainedModel:
    """Let the chosen weights learn and freeze the others, in place; the model again.

    A reward model's head always learns; a language model's with `full`, `top` and `head` (a head
    that is tied takes the embeddings along).  `top` includes the final norm.  Raises RecipeError
    for more top layers than there are, InputError when peft is needed and not installed.
    """
    if section.train == "full":
        return model.requires_grad_(True)
    model.requires_grad_(False)
    if section.train == "lora":
        _add_adapters(model, section, seed)
    elif section.train == "top":
        blocks = blocks_of(model)
        if section.top_layers > len(blocks):
            raise RecipeError(
                f"top_layers is {section.top_layers}, and {type(model).__name__} has {len(blocks)} "
                "layers; lower it, or set train: full"
            )
        for module in [*blocks[-section.top_layers :], *_final_norms(model)]:
            module.requires_grad_(True)
    head: Any = model.get_output_embeddings()
    if head is None:
        score_head(model).requires_grad_(True)
    elif section.train != "lora":
        head.requires_grad_(True)
    return model


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapters, if it has any, added to the weights they adapt, in place."""
    if not hasattr(model, "peft_config"):
        return model
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            adapted: Any = module
            # safe_merge adds to a copy: the weights may be shared with a model that still learns.
            adapted.merge(safe_merge=True)
            model.set_submodule(name, adapted.get_base_layer())
    del model.peft_config
    return model


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, first to last: what transformers never splits over devices."""
    names: Any = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _final_norms(model: PreTrainedModel) -> list[nn.Module]:
    """What stands beside the blocks and has vectors only."""
    parent: Any = model.get_decoder()
    return [
        child
        for child in parent.children()
        if (weights := list(child.parameters())) and all(weight.ndim == 1 for weight in weights)
    ]


def _add_adapters(model: PreTrainedModel, section: TrainSettings, seed: int) -> None:
    """LoRA on every linear layer of the blocks; A random by the seed, B zero."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(
            "train: lora needs peft, which is not installed; run "
            'pip install "starling-rlaif[lora]", or set train: full'
        ) from error
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    linear = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    ]
    alpha: Any = section.lora_alpha  # peft calls it an int, and only divides it
    config = LoraConfig(r=section.lora_rank, lora_alpha=alpha, target_modules=linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before LoRA, for the time being; nothing changes where it has none."""
    adapted: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)


def untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own, in place, and say so; nothing where it has them.

    A head that learns and is the embeddings too would move what a frozen trunk reads.
    """
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(embeddings.weight.detach().clone())
        config: Any = model.config
        config.tie_word_embeddings = False
        logger.info(
            "the head learns and the embeddings stay: they are no longer tied, and the saved model "
            f"has {head.weight.numel():,} weights more"
        )
