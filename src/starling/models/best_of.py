"""Best-of-n: several answers to one conversation, and the one that a reward model likes best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from starling.base.errors import DataError
from starling.data.records import Message
from starling.models.interfaces import Failure, Reply, Request, Responder

if TYPE_CHECKING:
    from starling.models.reward_model import RewardModel, Scored


def best_of(
    groups: Sequence[Sequence[Request]], responder: Responder, reward_model: "RewardModel"
) -> list[Reply]:
    """One reply per group: of its requests' replies the one that scores highest, of equals the
    first.

    A group asks the same conversation with other seeds; no two requests share an id.  An answer
    that was cut is scored without an end marker.  Raises DataError when a call fails.
    """
    requests = [request for group in groups for request in group]
    replies = replies_by_id(responder, requests)
    if len(replies) < len(requests) or not all(groups):
        raise ValueError("every group needs requests, and every request an id of its own")
    scores = reward_model.score(_scored(request, replies[request.id]) for request in requests)
    remaining = iter(zip(requests, scores.tolist(), strict=True))
    chosen = (max((next(remaining) for _ in group), key=lambda pair: pair[1]) for group in groups)
    return [replies[request.id] for request, _ in chosen]


def replies_by_id(responder: Responder, requests: Sequence[Request]) -> dict[str, Reply]:
    """Every request's reply; raises DataError naming the first call that failed."""
    replies: dict[str, Reply] = {}
    for outcome in responder.respond(requests):
        if isinstance(outcome, Failure):
            raise DataError(f"no answer to {outcome.request_id}: {outcome.reason}")
        replies[outcome.request_id] = outcome
    return replies


def _scored(request: Request, reply: Reply) -> "Scored":
    from starling.models.reward_model import Scored

    answer = Message(role="assistant", content=reply.text)
    return Scored(
        (*request.messages, answer), mode=request.mode, finished=reply.finish_reason == "stop"
    )
