"""What is gathered for a prompt: the answers of its row first, then the candidates'."""

import threading

from starling.base.context import Context
from starling.data.records import Answer, Message, Prompt
from starling.feedback.candidates import Source, collect_answers, open_sources
from starling.feedback.config import Candidate
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Usage


class Scripted:
    """Says what the table holds under the request's id, last request first."""

    identity = "scripted"
    commits_together = False

    def __init__(self, said):
        self.said = said
        self.asked = []

    def respond(self, requests):
        for request in reversed(list(requests)):
            self.asked.append(request)
            text = self.said.get(request.id, "")
            if isinstance(text, Failure):
                yield text
            else:
                yield Reply(request.id, text, "stop", Usage(1, 1))


def prompt(*kept, id="p"):
    answers = tuple(Answer(answer=text, model="kept", finish_reason="length") for text in kept)
    return Prompt(messages=(Message(role="user", content=id),), id=id, answers=answers)


def gather(tmp_path, prompts, candidates, said):
    """Each candidate's name and answers, in order; they say what `said` holds."""
    settings = [Candidate(name=name, model=name, answers=n) for name, n in candidates]
    responders = [Scripted(said) for _ in settings]
    sources = [
        Source(each, Recorded(responder, tmp_path / f"{each.name}.sqlite"))
        for each, responder in zip(settings, responders, strict=True)
    ]
    found = collect_answers(sources, prompts, seed=0)
    for source in sources:
        source.responder.close()
    return found


def texts(answer_set):
    return [answer.answer for answer in answer_set.answers]


def test_answers_stand_in_the_rows_then_the_candidates_order(tmp_path):
    said = {"p/a/0": "a0", "p/a/1": "a1", "p/b/0": "b0"}
    [found] = gather(tmp_path, [prompt("k0", "k1")], [("a", 2), ("b", 1)], said)
    assert texts(found) == ["k0", "k1", "a0", "a1", "b0"]
    assert [each.model for each in found.answers] == ["kept", "kept", "a", "a", "b"]
    assert [each.finish_reason for each in found.answers] == ["length"] * 2 + ["stop"] * 3
    assert all(each.rank is None for each in found.answers)


def test_what_says_the_same_is_merged_across_rows_and_candidates(tmp_path):
    said = {"p/a/0": " same ", "p/a/1": "other", "p/b/0": "  ", "p/b/1": "other"}
    [found] = gather(tmp_path, [prompt("same")], [("a", 2), ("b", 2)], said)
    assert texts(found) == ["same", "other"]
    assert [each.model for each in found.answers] == ["kept", "a"]
    assert (found.num_merged, found.num_empty, found.num_dropped) == (2, 1, 0)


def test_a_failed_call_leaves_one_answer_less_and_its_reason(tmp_path):
    said = {"p/a/0": Failure("p/a/0", "no"), "p/b/0": "b0", "q/a/0": "a0", "q/b/0": "b0"}
    first, second = gather(tmp_path, [prompt(), prompt(id="q")], [("a", 1), ("b", 1)], said)
    assert texts(first) == ["b0"]
    assert first.failures == ("a: no",)
    assert texts(second) == ["a0", "b0"]
    assert second.failures == ()


def test_more_answers_than_there_are_letters_are_dropped_from_the_end(tmp_path):
    kept = [f"k{n}" for n in range(28)]
    said = {"p/a/0": "a0", "p/a/1": "a1", "p/b/0": "b0"}
    candidates = [("a", 2), ("b", 1)]
    [found] = gather(tmp_path, [prompt(*kept)], candidates, said)
    assert texts(found) == kept[:26]
    assert (found.num_merged, found.num_dropped) == (0, 2)
    [found] = gather(tmp_path, [prompt(*kept[:25])], candidates, said)
    assert texts(found) == [*kept[:25], "a0"]
    assert (found.num_merged, found.num_dropped) == (0, 0)


def test_every_candidate_decodes_by_its_own_settings(tmp_path):
    settings = Candidate(name="a", model="m", temperature=0.3, top_p=0.9, top_k=7, max_tokens=5)
    responder = Scripted({})
    with Recorded(responder, tmp_path / "calls.sqlite") as recorded:
        collect_answers([Source(settings, recorded)], [prompt()], seed=0)
    [request] = responder.asked
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.3, 0.9, 7)
    assert sampling.max_tokens == 5


def test_endpoints_are_asked_at_the_same_time_each_in_its_own_thread(tmp_path, monkeypatch):
    # Neither answers before both were asked; one after the other would break the barrier.
    both = threading.Barrier(2, timeout=20)
    threads = []

    class Waiting(Scripted):
        def __init__(self, name):
            super().__init__({f"p/{name}/0": name})
            self.identity = name

        def respond(self, requests):
            for request in requests:
                both.wait()
                threads.append(threading.get_ident())
                yield Reply(request.id, self.said[request.id], "stop", Usage(1, 1))

    monkeypatch.setattr("starling.feedback.candidates._responder", lambda c, _: Waiting(c.name))
    candidates = [Candidate(name=name, model=name, url="http://x/v1") for name in ("b", "a")]
    context = Context(rank=0, world_size=1, device="cpu", threads=1)
    with open_sources(candidates, tmp_path / "calls.sqlite", context) as sources:
        [found] = collect_answers(sources, [prompt()], seed=0)
    assert texts(found) == ["b", "a"]
    assert len({*threads, threading.get_ident()}) == 3
