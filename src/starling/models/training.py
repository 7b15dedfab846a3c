"""What the three training loops share: the optimizer, the schedules, and a journal on disk.

The loops themselves stand in `sft`, `reward` and `ppo`, and read as their algorithms.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from starling.base.checkpoint import Snapshot, load_newest, save_checkpoint
from starling.base.context import Context
from starling.base.errors import CheckpointError, InputError, some
from starling.base.metrics import MetricsLog
from starling.base.progress import Progress
from starling.base.seeding import permutation
from starling.base.training_state import (
    check_names,
    flatten_optimizer,
    gathered,
    prefixed,
    restore_optimizer,
    select,
    shared_like,
)

Schedule = Callable[[int], float]
"""The factor of the peak learning rate at a step, counted from 0."""


def warmup_then(decay: Schedule, warmup_steps: int) -> Schedule:
    """Rise linearly over the first `warmup_steps`, then follow `decay`."""
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else decay(step)


def cosine(steps: int, warmup_steps: int = 0) -> Schedule:
    """Half a cosine from 1, when warm-up ends, to 0 after the last of `steps`."""
    span = max(1, steps - warmup_steps)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / span)))


def linear(steps: int) -> Schedule:
    """From 1 at step 0 straight to 0 after the last of `steps` (Ziegler 2019, released code)."""
    return lambda step: 1 - step / steps


def constant(_step: int) -> float:
    """1, always."""
    return 1.0


@dataclass(frozen=True)
class Trainable:
    """Modules that learn, their optimizer and its schedule."""

    modules: Mapping[str, nn.Module]
    optimizer: torch.optim.Optimizer
    lr: float
    schedule: Schedule
    max_grad_norm: float | None
    tensorflow_eps: float | None = None
    """Adam's epsilon where it stands beside the uncorrected root of the second moment."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, step: int) -> float:
        """Clip the gradients, take optimizer step `step`, clear them; returns the norm before.

        Raises InputError for a norm that is not finite, before any weight has moved.
        """
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        total = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if not math.isfinite(norm):
            raise InputError(
                f"the gradient norm is {norm} at optimizer step {step}; lower the stage's lr, or "
                "its max_grad_norm, then run the same command again"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.schedule(step)
            if self.tensorflow_eps is not None:
                group["eps"] = self._eps(group)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _eps(self, group: Mapping[str, Any]) -> float:
        """TensorFlow divides by sqrt(v) + eps, PyTorch by sqrt(v / (1 - beta2^t)) + eps.

        The first is what Ziegler's code learned with: early steps are far smaller where gradients
        are, https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo.
        """
        taken = [int(state["step"]) for state in self.optimizer.state.values() if state]
        assert self.tensorflow_eps is not None
        return self.tensorflow_eps / math.sqrt(1 - group["betas"][1] ** (max(taken, default=0) + 1))


@runtime_checkable
class AdamSettings(Protocol):
    """What every training stage's section has."""

    lr: float
    weight_decay: float

    @property
    def max_grad_norm(self) -> float | None: ...


def adamw(
    name: str,
    module: nn.Module,
    section: AdamSettings,
    schedule: Schedule,
    *,
    eps: float = 1e-8,
    beta2: float = 0.999,
) -> Trainable:
    """AdamW over a module's parameters that want a gradient, as the stage's `section` sets it."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        wanted,
        lr=section.lr,
        weight_decay=section.weight_decay,
        eps=eps,
        betas=(0.9, beta2),
        # A third of the time, in one pass over the weights; shares of weights have no such kernel.
        fused=not any(isinstance(parameter, DTensor) for parameter in wanted),
    )
    return Trainable({name: module}, optimizer, section.lr, schedule, section.max_grad_norm)


STATE_FIELDS = ("tensors", "optimizer", "metrics_offset", "extra")
"""What a checkpoint's state holds; `tensors` names those beside it."""


class Journal:
    """A stage's record: metrics, timing, progress, and checkpoints that resume it exactly.

    `extra` is the stage's own state (plain JSON) and `tensors` its own tensors beside the modules:
    whatever the loop carries from step to step.  Weights that do not learn are not saved.

    Every process calls every method; rank 0 alone writes, shows, and gathers what the others hold
    (`gathered` says what memory it takes).
    """

    def __init__(
        self, out: Path, trainable: Trainable, context: Context, stage: str, steps: int, every: int
    ) -> None:
        """`every` is how many of the `steps` lie between two checkpoints."""
        out.mkdir(parents=True, exist_ok=True)
        self._folder = out / "checkpoints"
        self._trainable = trainable
        self._context = context
        self._stage = stage
        self._every = every
        self._progress = Progress(stage, steps)
        self._metrics = MetricsLog(context.own_path(out / "metrics.jsonl"))
        self._timing = MetricsLog(context.own_path(out / "timing.jsonl"))
        self._clock = time.perf_counter()

    def resume(self) -> Snapshot:
        """Restore the newest checkpoint into modules and optimizer; step 0 when there is none."""
        snapshot = load_newest(self._folder)
        if snapshot is None:
            self._cut_back(0)
            return Snapshot(0, {}, {"extra": {}})
        tensors = snapshot.tensors
        check_names("fields of the checkpoint", STATE_FIELDS, snapshot.state)
        check_names("tensors of the checkpoint", snapshot.state["tensors"], tensors)
        for name, module in self._trainable.modules.items():
            _load(name, module, select(f"module/{name}", tensors))
        restore_optimizer(
            self._trainable.optimizer, select("optimizer", tensors), snapshot.state["optimizer"]
        )
        self._cut_back(snapshot.state["metrics_offset"])
        return Snapshot(snapshot.step, select("extra", tensors), snapshot.state)

    def _cut_back(self, offset: int) -> None:
        if self._context.rank == 0:
            self._metrics.cut_back(offset)

    def log(self, step: int, values: Mapping[str, float], note: str) -> None:
        """Write one step's metrics, its wall-clock seconds to timing.jsonl, and show `note`."""
        if self._context.rank > 0:
            return
        self._metrics.log(step, values)
        now = time.perf_counter()
        self._timing.log(step, {f"{self._stage}/seconds": now - self._clock})
        self._clock = now
        self._progress.update(step, note)

    def boundary(
        self,
        step: int,
        extra: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """End a step: save when it is due or a signal has arrived, then stop if one has.

        One that reached any process stops them all.
        """
        stop = self._context.stop
        stop.signal_number = self._context.most(stop.signal_number or 0) or None
        if step % self._every == 0 or stop.signal_number is not None:
            self.save(step, extra or {}, tensors or {})
        stop.check()

    def save(self, step: int, extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint of everything the loop needs to go on after `step`."""
        optimizer = flatten_optimizer(self._trainable.optimizer)
        saved = prefixed("optimizer", optimizer.tensors) | prefixed("extra", tensors)
        for name, module in self._trainable.modules.items():
            saved |= prefixed(f"module/{name}", _learned(module))
        saved = gathered(saved, self._context)
        if self._context.rank > 0:
            return
        state = {
            "tensors": sorted(saved),
            "optimizer": optimizer.state,
            "metrics_offset": self._metrics.offset(),
            "extra": dict(extra),
        }
        save_checkpoint(self._folder, Snapshot(step, saved, state))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)
        self._metrics.close()
        self._timing.close()


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """The module's state without its frozen weights, which it has from where it was loaded."""
    named = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {n: tensor for n, tensor in module.state_dict().items() if n not in frozen}


def _load(name: str, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = _learned(module)
    check_names(f"weights of {name}", own.keys(), saved)
    other = [key for key, tensor in own.items() if tensor.shape != saved[key].shape]
    if other:
        raise CheckpointError(
            f"the checkpoint is of a model with other shapes ({some(other, 8)}); delete the "
            "stage's checkpoints to run the stage from its start"
        )
    for key, tensor in own.items():
        tensor.copy_(shared_like(tensor, saved[key]))


def batch_indices(step: int, batch: int, n: int, seed: int, purpose: str) -> list[int]:
    """The rows of optimizer step `step`: consecutive ones of the epochs' orders, none left out."""
    places = range(step * batch, (step + 1) * batch)
    numbers = range(places[0] // n, places[-1] // n + 1)
    epochs = {epoch: permutation(n, seed, purpose, epoch) for epoch in numbers}
    return [epochs[place // n][place % n] for place in places]
