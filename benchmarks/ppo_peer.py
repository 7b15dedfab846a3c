"""The peer of the PPO races: TRL 1.12.0's PPOTrainer, timed and, for the check, listened to.

Its value model is a network of its own; it has nothing else.  One call trains on 64 prompts: one
rollout, four epochs of four minibatches.  Its gradient accumulation is 1 (above it, it takes other
numbers of steps than it was asked for), so a minibatch is one forward pass, and no gradients are
clipped, which it never does.  A `generate()` pads prompts on the left; what follows an end marker
is its padding, id 0, which these models never draw.
"""

import contextlib
import importlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from racing import Seconds, model_shape, two_word_tokenizer
from torch import Tensor, nn
from transformers import (
    MistralForCausalLM,
    MistralForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
)

TRL = "trl-1.12.0"
PAD, END = 0, 2
ANSWER_TOKENS = 64
EPOCHS = MINIBATCHES = 4
CRITIC_SEED, REWARD_SEED = 1, 2
KL_COEF, VALUE_COEF, CLIP_RANGE, GAE_LAMBDA, ADAM_EPS = 0.05, 0.1, 0.2, 0.95, 1e-5

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Lengths:
    """Tokens of an update's prompts, and of the answers that were drawn to them."""

    prompts: Sequence[int]
    answers: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.prompts) + sum(self.answers)

    @property
    def width(self) -> int:
        """Of a batch padded to its longest prompt, in which rows are drawn until all have ended."""
        return max(self.prompts) + max(self.answers)


def end_chance(mean: float, most: int) -> float:
    """The chance to end at each token for which answers of `most` tokens at most have this mean."""
    low, high = 1e-6, 1.0
    while high - low > 1e-9:
        chance = (low + high) / 2
        longer = (1 - (1 - chance) ** most) / chance > mean
        low, high = (chance, high) if longer else (low, chance)
    return low


@torch.no_grad()
def new_policy(name: str, *, ragged: bool, device: str) -> Any:
    """A random policy in fp32 that never draws padding, and ends as `end_chance` says or never.

    A random model gives every token about the same chance.  Here the head has a bias, which is not
    trained: it forbids the padding, and gives the end marker, whose logit is nothing else, the
    chance that makes answers half as long as they may be in the mean.
    """
    torch.manual_seed(0)
    shape = model_shape(name)
    model: Any = MistralForCausalLM(shape)
    head = nn.Linear(shape.hidden_size, shape.vocab_size)
    head.weight.copy_(model.lm_head.weight)
    head.weight[END] = 0
    head.bias.requires_grad_(False).zero_()
    head.bias[[PAD, END]] = -1e4
    model.lm_head = head
    if ragged:
        others = model(torch.randint(3, shape.vocab_size, (8, 64))).logits.logsumexp(-1).mean()
        chance = end_chance(ANSWER_TOKENS / 2, ANSWER_TOKENS)
        head.bias[END] = others + math.log(chance / (1 - chance))
    return model.to(device)


def new_scorer(name: str, policy: Any, *, device: str, seed: int) -> Any:
    """A random reward model; with a policy, its critic: the policy's trunk under a random head."""
    torch.manual_seed(seed)
    shape = model_shape(name)
    shape.num_labels = 1
    model: Any = MistralForSequenceClassification(shape)
    if policy is not None:
        model.model.load_state_dict(policy.model.state_dict())
    return model.to(device)


def freeze_lower(model: Any, trained: int) -> Any:
    """Leave only the last `trained` layers, the final norm and the head as they are."""
    base = model.model
    for module in (base.embed_tokens, *base.layers[: len(base.layers) - trained]):
        module.requires_grad_(False)
    return model


class Stopwatch(TrainerCallback):
    """From the fetch of the prompts to the end of the last optimizer step and its metrics."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = self.end = Seconds.now(device)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = Seconds.now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end = Seconds.now(self.device)


@dataclass
class Heard:
    """What a recorded update drew, and what it computed at each of its optimizer steps."""

    sequences: Tensor | None = None  # [B, T] prompts padded on the left, then answers
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass
class TrlPpo:
    """PPOTrainer on models of its own, which go on from call to call; its optimizer starts anew."""

    policy: Any
    critic: Any
    reference: Any
    reward: Any
    lr: float
    phases: dict[str, Seconds] = field(default_factory=dict)
    drawn: list[Lengths] = field(default_factory=list)

    @staticmethod
    def new(name: str, *, kind: str, device: str, trained: int | None, lr: float) -> "TrlPpo":
        """Models loaded in bf16 where the kind says so; `trained` layers learn, or all."""
        dtype = torch.bfloat16 if "bf16" in kind else torch.float32
        policy = new_policy(name, ragged="ragged" in kind, device=device).to(dtype)
        critic = new_scorer(name, policy, device=device, seed=CRITIC_SEED).to(dtype)
        reward = new_scorer(name, None, device=device, seed=REWARD_SEED).to(dtype)
        reference = deepcopy(policy).eval().requires_grad_(False)
        if trained is not None:
            freeze_lower(policy, trained)
            freeze_lower(critic, trained)
        return TrlPpo(policy, critic, reference, reward.eval(), lr)

    def __call__(self, prompts: Prompts) -> Seconds:
        torch.use_deterministic_algorithms(False)
        watch = Stopwatch(self.policy.device.type)
        steps = self._train(prompts, [watch])
        assert steps == EPOCHS * MINIBATCHES, steps
        assert torch.get_num_threads() == 1
        return watch.end.since(watch.start)

    def heard(self, prompts: Prompts, orders: Sequence[Sequence[int]]) -> Heard:
        """Train once, and tell what happened; epoch n visits the rows in the order `orders[n]`."""
        heard = Heard()
        shuffles = [torch.tensor(order) for order in orders]
        with mock.patch("numpy.random.permutation", side_effect=shuffles):
            self._train(prompts, [], heard)
        return heard

    def _train(self, prompts: Prompts, callbacks: list[Any], heard: Heard | None = None) -> int:
        """Returns the optimizer steps that were taken."""
        ppo, datasets = map(importlib.import_module, ("trl.experimental.ppo", "datasets"))
        with tempfile.TemporaryDirectory() as folder:
            trainer = ppo.PPOTrainer(
                args=ppo.PPOConfig(output_dir=folder, **self._options(len(prompts))),
                processing_class=two_word_tokenizer("left"),
                model=self.policy,
                ref_model=self.reference,
                reward_model=self.reward,
                value_model=self.critic,
                train_dataset=datasets.Dataset.from_dict({"input_ids": [*map(list, prompts)]}),
                callbacks=callbacks,
            )
            trainer.remove_callback(PrinterCallback)
            steps: list[Any] = []
            hear_loss = partial(_hear_loss, heard, trainer)
            with (
                self._clocked(
                    "generate", self.policy, "generate", partial(self._hear_answers, heard)
                ),
                self._clocked("backward", trainer.accelerator, "backward", hear_loss),
                self._clocked(
                    "optimizer", trainer.optimizer, "step", lambda *_, **__: steps.append(None)
                ),
                # It prints a line, and stdout is for the rows.
                contextlib.redirect_stdout(io.StringIO()),
            ):
                trainer.train()
        return len(steps)

    @contextlib.contextmanager
    def _clocked(
        self, phase: str, owner: Any, method: str, hear: Callable[..., None]
    ) -> Iterator[None]:
        """Add to `phases` what the method takes; `hear` is told its result and its arguments."""
        called, device = getattr(owner, method), self.policy.device.type

        def clocked(*args: Any, **kwargs: Any) -> Any:
            start = Seconds.now(device)
            result = called(*args, **kwargs)
            took = Seconds.now(device).since(start)
            self.phases[phase] = self.phases.get(phase, Seconds(0, 0)) + took
            hear(result, *args, **kwargs)
            return result

        with mock.patch.object(owner, method, clocked):
            yield

    def _hear_answers(self, heard: Heard | None, output: Any, **given: Tensor) -> None:
        drawn = output.sequences[:, given["input_ids"].shape[1] :] != PAD
        self.drawn.append(
            Lengths(given["attention_mask"].sum(dim=1).tolist(), drawn.sum(dim=1).tolist())
        )
        if heard is not None:
            heard.sequences = output.sequences

    def _options(self, num_prompts: int) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": num_prompts,
            "gradient_accumulation_steps": 1,
            "local_rollout_forward_batch_size": num_prompts,
            "num_mini_batches": MINIBATCHES,
            "num_ppo_epochs": EPOCHS,
            "total_episodes": num_prompts,
            "response_length": ANSWER_TOKENS,
            "temperature": 1.0,
            # A trainer seeds torch; with one seed every update would draw answers equally long.
            "seed": 42 + len(self.drawn),
            "stop_token_id": END,
            "learning_rate": self.lr,
            "adam_epsilon": ADAM_EPS,
            "kl_coef": KL_COEF,
            "vf_coef": VALUE_COEF,
            "cliprange": CLIP_RANGE,
            "cliprange_value": CLIP_RANGE,
            "lam": GAE_LAMBDA,
            # The models' own dtype counts; PPOTrainer reads neither of these two.
            "bf16": False,
            "gradient_checkpointing": False,
            "num_sample_generations": 0,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "use_cpu": self.policy.device.type == "cpu",
        }


def _hear_loss(heard: Heard | None, trainer: Any, _: None, loss: Tensor) -> None:
    if heard is not None:
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        heard.losses.append(float(loss))
        heard.norms.append(float(nn.utils.get_total_norm(gradients)))
