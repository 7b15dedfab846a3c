"""What one forward pass reads: prompts with their responses, and where each token is predicted.

The responses to a prompt stand behind one copy of it (`models/packing.py`), so that it is computed
once for all of them.  Read are only the states that predict a response's tokens: the prompt's last
one, and the response's but its last.

Shapes: T tokens of all bundles, N response tokens of all bundles, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from starling.models.causal_lm import TOKENS_PER_BATCH, Batch, hidden_states
from starling.models.packing import Packed, PackedRow, packed_reads

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Bundle:
    """A prompt and some of the responses to it: those of these rows of the rollout.

    Example: `Bundle((1, 7), ((9, 3), (8, 8, 3)), (4, 5))`.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    rows: tuple[int, ...]

    @property
    def read(self) -> tuple[Ids, ...]:
        """Of each response what predicts something: all but its last token."""
        return tuple(response[:-1] for response in self.responses)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.read))

    @cached_property
    def packed_row(self) -> PackedRow:
        """A single response needs no sharing, and is read as one sequence with its prompt."""
        begin = len(self.prompt) - 1
        if len(self.responses) == 1:
            return PackedRow(self.prompt + self.read[0], (), begin)
        return PackedRow(self.prompt, tuple(ids for ids in self.read if ids), begin)


def bundle(
    prompts: Sequence[Ids], responses: Sequence[Ids], rows: Sequence[int], *, most: int | None
) -> list[Bundle]:
    """Neighbouring rows with the same prompt together, at most so many in one."""
    found: list[Bundle] = []
    for row in rows:
        last = found[-1] if found else None
        has_room = last is not None and (most is None or len(last.rows) < most)
        if last is not None and has_room and last.prompt == prompts[row]:
            joined = (*last.responses, responses[row]), (*last.rows, row)
            found[-1] = Bundle(last.prompt, *joined)
        else:
            found.append(Bundle(prompts[row], (responses[row],), (row,)))
    return found


def bundle_batches(
    bundles: Sequence[Bundle], device: str, *, tokens: int | None, most: int | None
) -> list[list[Bundle]]:
    """Bundles for one forward each: so many tokens and rows at most, long ones first.

    Without `tokens`, as many as suit the device; a longer bundle is a batch of its own.
    """
    limit = TOKENS_PER_BATCH[device.partition(":")[0]] if tokens is None else tokens
    batches: list[list[Bundle]] = []
    num_tokens = num_rows = 0
    for each in sorted(bundles, key=lambda each: (-each.num_tokens, each.rows)):
        num_tokens, num_rows = num_tokens + each.num_tokens, num_rows + len(each.rows)
        if not batches or num_tokens > limit or (most is not None and num_rows > most):
            batches.append([])
            num_tokens, num_rows = each.num_tokens, len(each.rows)
        batches[-1].append(each)
    return batches


class Reading:
    """Bundles as tensors: the flat sequence, each response token, and where it is predicted."""

    def __init__(self, bundles: Sequence[Bundle], device: str) -> None:
        self.bundles = tuple(bundles)
        self.device = device
        self.rows = [row for each in bundles for row in each.rows]
        """Rows of the rollout, in the order in which their tokens stand."""
        flat = [ids for each in bundles for response in each.responses for ids in response]
        self.targets: Int[Tensor, " N"] = torch.tensor(flat, device=device)

    @cached_property
    def packed(self) -> Packed:
        return Packed([each.packed_row for each in self.bundles], self.device)

    @cached_property
    def predictors(self) -> Int[Tensor, " N"]:
        """Places among the packed reads: the prompt's last, then each response but its last."""
        places: list[int] = []
        start = 0
        for each in self.bundles:
            behind = start + 1
            for response in each.responses:
                places += [start, *range(behind, behind + len(response) - 1)]
                behind += len(response) - 1
            start = behind
        return torch.tensor(places, device=self.device)


def packed_predictors(
    backbone: nn.Module, reading: Reading, trunk: Float[Tensor, "T D"] | None = None
) -> Float[Tensor, "N D"]:
    """The state that predicts each response token; the last layer computes little else."""
    return packed_reads(backbone, reading.packed, trunk).index_select(0, reading.predictors)


def padded_predictors(
    model: PreTrainedModel, reading: Reading, *, pad_id: int
) -> Float[Tensor, "N D"]:
    """The same of a model that cannot be packed: every response with its own prompt, padded."""
    pairs = [(each.prompt, response) for each in reading.bundles for response in each.responses]
    batch = Batch([prompt + response for prompt, response in pairs], pad_id, reading.device)
    width = batch.token_ids.shape[1]
    places = [
        number * width + len(prompt) - 1 + step
        for number, (prompt, response) in enumerate(pairs)
        for step in range(len(response))
    ]
    states = hidden_states(model, batch.token_ids).flatten(0, 1)
    return states.index_select(0, torch.tensor(places, device=reading.device))
