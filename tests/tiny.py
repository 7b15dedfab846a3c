"""Random models of a few thousand parameters, saved as real folders, for tests that need one.

Their weights are larger than a fresh network's, so that what they say depends on every token they
read: a test that compares two read-outs can then tell them apart.
"""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from starling.data.tokenizer import SPECIAL_TOKENS, TextTokenizer, train_tokenizer
from starling.models.causal_lm import LanguageModel, new_language_model, save_model
from starling.models.reward_model import RewardModel

TEXTS = (
    "GPT4 Correct User: What is the sum?",
    "GPT4 Correct Assistant: The answer is",
    "Code User:",
)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2}


def tiny_tokenizer(vocab_size: int = 300) -> TextTokenizer:
    """Byte-level BPE: OpenChat's special tokens, all bytes and a few dozen merges."""
    return train_tokenizer(list(TEXTS) * 3, vocab_size=vocab_size)


def sentencepiece_tokenizer() -> TextTokenizer:
    """A tokenizer of Mistral's kind: it puts a space before every text, and falls back to bytes."""
    pieces = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [*string.ascii_letters, *string.digits, ":", "\u2581U", "\u2581A"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [("\u2581", "U"), ("\u2581", "A")]
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end_of_turn|>",
        pad_token="<|pad_0|>",
    )
    return TextTokenizer(saved)


def sharpen(model: torch.nn.Module, factor: float = 8.0) -> None:
    """Make every matrix larger, and with it the differences between contexts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)


def tiny_policy(seed: int = 0, max_length: int = 256) -> LanguageModel:
    """A random policy of two layers and width 32 that speaks openchat."""
    shape = SHAPE | {"max_length": max_length}
    loaded = new_language_model(shape, tiny_tokenizer(), "openchat", seed=seed)
    sharpen(loaded.model)
    return loaded


def tiny_policy_folder(path: Path, seed: int = 0, *, max_length: int = 256) -> Path:
    """Save a tiny policy with its tokenizer under `path`, and return it."""
    loaded = tiny_policy(seed, max_length)
    save_model(path, loaded.model, loaded.codec)
    return path


def tiny_reward_folder(path: Path, policy: Path, seed: int = 0) -> Path:
    """Save an untrained reward model that stands on `policy`'s weights, and return `path`."""
    RewardModel.from_language_model(str(policy), seed=seed).save(path)
    return path


def eleven_token_model(seed: int = 0) -> MistralForCausalLM:
    """A causal model with a vocabulary small enough to count every outcome."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = MistralForCausalLM(config).eval()
    sharpen(model, 12.0)
    return model


def absolute_position_model() -> GPT2LMHeadModel:
    """A model that learnt each position's own vector: unlike a rotary one, it sees a shift."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    sharpen(model, 12.0)
    return model
