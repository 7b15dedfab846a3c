"""Functions run by several processes at once, forked, so that none spends its time on imports."""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from starling.base.context import Context


@dataclass
class Settings:
    """What a stage's section says about training."""

    train: str = "full"
    precision: str = "float32"
    gradient_checkpointing: bool = False
    top_layers: int = 1
    lora_rank: int = 4
    lora_alpha: float = 8.0
    lr: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


def on_ranks(size, function, folder: Path, *arguments):
    """What `function(context, *arguments)` returned on each rank (JSON values); all must succeed.

    One rank runs in a fork too, without a process group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    children = [_fork(rank, size, function, folder, arguments) for rank in range(size)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * size
    return [
        json.loads((folder / f"rank-{rank}-of-{size}.json").read_text()) for rank in range(size)
    ]


def _fork(rank, size, function, folder, arguments):
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        if size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/meet-{size}", rank=rank, world_size=size
            )
        result = function(Context(rank, size, "cpu", 1), *arguments)
        (folder / f"rank-{rank}-of-{size}.json").write_text(json.dumps(result))
        if size > 1:
            dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def as_torchrun_would(size, function):
    """Call the function in forks with torchrun's environment; each one's exit status and stderr."""
    # As torchrun does, the parent holds the store through which the processes meet.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    everyone = {
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    children = []
    for rank in range(size):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(writing, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            named = everyone | {"RANK": rank, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in named.items()}
            status = 99
            try:
                status = function(rank) or 0
            except SystemExit as error:
                status = error.code
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        children.append((child, reading))
    ended = []
    for child, reading in children:
        with os.fdopen(reading) as file:
            text = file.read()
        ended.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
    return ended
