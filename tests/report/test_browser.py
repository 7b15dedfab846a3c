"""The questions' browser in Chromium: no text runs or fetches anything; keys, filters, print."""

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from report.chromium import Tab, needs_chromium, new_tab
from report.folders import write_mt_bench, write_run
from report.payloads import PAYLOADS
from starling.report.compare import write_comparison
from starling.report.page import write_report

pytestmark = needs_chromium

OWN_TAGS = (
    "html head meta title style body script noscript h1 h2 h3 h4 h5 p div span bdi small strong "
    "ul li table thead tbody tr th td figure img figcaption section form label input select "
    "option button kbd article details summary dl dt dd code"
)

ALL_OPEN = "document.getElementById('open').click()"
SHOWN = (
    "[...document.querySelectorAll('.question')].map(e => e.querySelector('.where').textContent)"
)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address, and the paths that were asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}", asked
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


async def opened(tab: Tab, path: Path) -> None:
    """Load the page, open all that can be opened, and wait for what it might do then."""
    await tab.open(path)
    await tab.run(f"document.getElementById('open') && {ALL_OPEN}")
    with contextlib.suppress(AssertionError):  # a page that went elsewhere cannot answer
        await tab.run(
            "document.querySelectorAll('.detail button, .detail a').forEach(e => e.click())"
        )
    await asyncio.sleep(1.0)


def addresses(tab: Tab) -> set[str]:
    """What was fetched, without the page itself and its images' data."""
    urls = {each["request"]["url"] for each in tab.named("Network.requestWillBeSent")}
    return {url for url in urls if not url.startswith(("file:", "data:image/svg+xml;base64,"))}


def poisoned(address: str) -> list[str]:
    return [payload.replace("ADDRESS", address) for payload in PAYLOADS]


def write_hostile_pages(folder: Path, texts: list[str]) -> list[Path]:
    """A comparison and a report in which every text of a file is one of these."""
    everything = " ".join(texts)
    questions = [(text, text) for text in texts]
    scores = [(n % 10 + 1, -1) for n in range(len(texts))]
    outs = [
        write_mt_bench(folder / "one", everything, scores, questions, texts, judge=everything),
        write_mt_bench(folder / "two", texts[2], scores, questions, texts, references=texts[35]),
    ]
    run = write_run(folder / "run", {"sft": texts, "ppo": texts[::-1]})
    return [write_comparison([*outs, run], folder / "compare.html"), write_report(run)]


def test_fifty_payloads_neither_run_nor_fetch_and_are_read_as_text(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    texts = poisoned(address)

    async def look(path: Path) -> dict[str, Any]:
        async with new_tab() as tab:
            await opened(tab, path)
            found = {
                "owned": await tab.run("typeof window.owned"),
                "tags": await tab.run(
                    "[...new Set([...document.querySelectorAll('*')].map(e => e.localName))]"
                ),
                "handlers": await tab.run(
                    "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes])"
                    ".map(a => a.name).filter(n => n.startsWith('on') || n === 'style')"
                ),
                "scripts": await tab.run("document.scripts.length"),
                "answers": await tab.run(
                    "[...document.querySelectorAll('.answer > .said')].map(e => e.textContent)"
                ),
                "at": await tab.run("location.href"),
            }
            return found | {
                "fetched": addresses(tab),
                "dialogs": tab.named("Page.javascriptDialogOpening"),
                "thrown": tab.named("Runtime.exceptionThrown"),
                "log": tab.named("Log.entryAdded"),
            }

    for path in write_hostile_pages(tmp_path, texts):
        found = asyncio.run(look(path))
        assert found["owned"] == "undefined"
        assert found["fetched"] == set()
        assert found["dialogs"] == found["thrown"] == found["log"] == []
        assert set(found["tags"]) <= set(OWN_TAGS.split())
        assert found["handlers"] == []
        assert found["scripts"] == 2
        assert found["at"] == path.as_uri()
        hidden = re.compile("[\x00\x1b\x7f\u202c\u202e\u2066\u2069]")
        shown = [
            hidden.sub(lambda mark: f"\u27e8U+{ord(mark[0]):04X}\u27e9", text).replace("\r", "")
            for text in texts
        ]
        assert set(shown) <= set(found["answers"])
    assert asked == []


def test_the_same_payloads_bite_on_a_page_without_defence(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    """Otherwise the test above would pass whatever the pages did."""
    address, asked = server
    path = tmp_path / "bare.html"
    texts = [text for text in poisoned(address) if "refresh" not in text and "base/" not in text]
    body = "".join(f"<div>{text}</div>\n" for text in texts[9:])
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{texts[0]}{body}", encoding="utf-8")

    async def look() -> tuple[str, set[str]]:
        async with new_tab() as tab:
            await opened(tab, path)
            for _ in range(100):  # a frame is loaded when its process is there
                if "/frame" in asked:
                    break
                await asyncio.sleep(0.1)
            return await tab.run("typeof window.owned"), addresses(tab)

    owned, fetched = asyncio.run(look())
    assert owned == "number"
    paths = {url.rpartition("/")[2] for url in fetched}
    assert {"run", "image", "srcset", "svg-image", "poster", "sheet", "inline"} <= paths
    # A frame is a process of its own, whose requests only the server sees.
    assert set(asked) >= {"/run", "/image", "/sheet", "/frame"}


def test_the_policy_alone_stops_what_escaping_would_let_through(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    """Two locks: here the texts are put into the page raw, under our pages' own policy."""
    address, asked = server
    page = write_comparison([write_mt_bench(tmp_path / "one", "a", [(1, 2)] * 3)], tmp_path / "c")
    content = page.read_text(encoding="utf-8")
    # A refresh is navigation, which no policy of a page forbids: that one is escaping's alone.
    texts = [text for text in poisoned(address) if "refresh" not in text and "<!--" not in text]
    path = tmp_path / "raw.html"
    raw = "".join(f"<div>{text}</div>\n" for text in texts)
    path.write_text(content.replace("<h1>", f"{raw}<h1>", 1), encoding="utf-8")

    async def look() -> tuple[str, int, str]:
        async with new_tab() as tab:
            await tab.open(path)
            await asyncio.sleep(1.0)
            blocked = [entry for entry in tab.named("Log.entryAdded") if "Content" in str(entry)]
            return (
                await tab.run("typeof window.owned"),
                len(blocked),
                await tab.run("location.href"),
            )

    owned, num_blocked, at = asyncio.run(look())
    assert owned == "undefined"
    assert num_blocked > 10
    assert asked == []
    assert at == path.as_uri()


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Two models on five questions; scores (alpha; beta) a turn, and words to be found."""
    questions = [
        ("writing", "Describe a meadow."),
        ("math", "Add two and two."),
        ("writing", "Sing of the sea."),
        ("stem", "What is mass?"),
        ("math", "Halve a hundred."),
    ]
    alpha = [(9, 9), (2, 8), (5, 5), (7, -1), (6, 6)]
    beta = [(9, 8), (9, 8), (5, 5), (7, 7), (3, 6)]
    said = ["green", "four", "blue Whale", "matter", "fifty"]
    return write_comparison(
        [
            write_mt_bench(tmp_path / "one", "alpha", alpha, questions, said),
            write_mt_bench(tmp_path / "two", "beta", beta, questions),
        ],
        tmp_path / "compare.html",
    )


def choose(name: str, value: str) -> str:
    """JavaScript that sets a control as a person would."""
    return (
        f"(() => {{ const e = document.getElementById({name!r}); e.value = {value!r};"
        " e.dispatchEvent(new Event('input', { bubbles: true })) })()"
    )


WRITING_1, MATH_1, WRITING_2, STEM, MATH_2 = (
    "81 writing",
    "82 math",
    "83 writing",
    "84 stem",
    "85 math",
)


def test_filters_search_and_order_show_what_they_say(page: Path) -> None:
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({}, [WRITING_1, MATH_1, WRITING_2, STEM, MATH_2]),
        ({"category": "math"}, [MATH_1, MATH_2]),
        ({"search": "whale BLUE"}, [WRITING_2]),  # an answer; words in any order and case
        ({"search": "whale two"}, []),  # all of the words
        ({"search": "[[7]]"}, [STEM]),  # a judgment
        ({"search": "hundred"}, [MATH_2]),  # a question
        ({"from": "9"}, [WRITING_1, MATH_1]),
        ({"to": "2.5"}, [MATH_1]),
        ({"from": "3", "to": "5"}, [WRITING_2, MATH_2]),
        # Turn by turn: 1, 7, 0, none, 3.
        ({"show": "apart 1"}, [WRITING_1, MATH_1, MATH_2]),
        ({"show": "apart 3"}, [MATH_1, MATH_2]),
        ({"show": "apart 5"}, [MATH_1]),
        ({"show": "failed 1"}, [STEM]),
        ({"order": "apart"}, [MATH_1, MATH_2, WRITING_1, WRITING_2, STEM]),
        ({"order": "lowest"}, [MATH_1, MATH_2, WRITING_2, STEM, WRITING_1]),
        ({"order": "highest"}, [WRITING_1, MATH_1, STEM, MATH_2, WRITING_2]),
        ({"category": "math", "order": "lowest", "search": "add"}, [MATH_1]),
        ({"search": "nothing has this"}, []),
    ]

    async def look() -> None:
        async with new_tab() as tab:
            await tab.open(page)
            for settings, expected in cases:
                await tab.run("document.getElementById('reset').click()")
                await asyncio.sleep(0.05)
                for name, value in settings.items():
                    await tab.run(choose(name, value))
                assert await tab.run(SHOWN) == expected, settings
                count = await tab.run("document.getElementById('count').textContent")
                wanted = f"{len(expected)} of 5" if expected else "None of 5"
                assert count.startswith(wanted)

    asyncio.run(look())


def test_judge_against_gold_is_offered_only_where_there_is_gold(page: Path, tmp_path: Path) -> None:
    # Gold 0.5 is 5.5 on the judge's scale; the scores are 2, 3, ... 9: apart by 3.5, 2.5, ...
    texts = [f"answer {n}" for n in range(8)]
    run = write_report(write_run(tmp_path / "run", {"sft": texts, "ppo": texts}))
    options = "[...document.querySelectorAll('#show option')].map(e => e.value)"

    async def look() -> None:
        async with new_tab() as tab:
            await tab.open(page)
            assert not [each for each in await tab.run(options) if "gold" in each]
        async with new_tab() as tab:
            await tab.open(run)
            assert "gold 2" in await tab.run(options)
            await tab.run(choose("show", "gold 2"))
            await tab.run(choose("order", "gold"))
            names = [f"b{n} math" for n in (0, 7, 1, 6)]
            assert await tab.run(SHOWN) == names

    asyncio.run(look())


def test_everything_can_be_done_with_keys_alone(page: Path) -> None:
    at = "document.activeElement.querySelector('.where')?.textContent || document.activeElement.id"
    is_open = "document.querySelectorAll('.row[aria-expanded=true]').length"

    async def look() -> None:
        async with new_tab() as tab:
            await tab.open(page)
            for key, expected in (
                ("j", WRITING_1),
                ("j", MATH_1),
                ("ArrowDown", WRITING_2),
                ("k", MATH_1),
                ("ArrowUp", WRITING_1),
                ("k", WRITING_1),
            ):
                await tab.press(key)
                assert await tab.run(at) == expected, key
            await tab.press("Enter")
            assert await tab.run(is_open) == 1
            texts = "[...document.querySelectorAll('.answer > .said')].map(e => e.textContent)"
            assert await tab.run(texts) == ["green", "beta on 0", "green again", "beta on 0 again"]
            assert "outline-style: none" not in await tab.run(
                "'outline-style: ' + getComputedStyle(document.activeElement).outlineStyle"
            )
            await tab.press("Escape")
            assert await tab.run(is_open) == 0
            await tab.press("/")
            assert await tab.run(at) == "search"
            for sign in "sea":
                await tab.press(sign)
            assert await tab.run(SHOWN) == [WRITING_2]
            await tab.press("j")  # typed, not obeyed
            assert await tab.run("document.getElementById('search').value") == "seaj"
            await tab.press("Escape")
            assert len(await tab.run(SHOWN)) == 5
            assert await tab.run(at) == WRITING_1

    asyncio.run(look())


def test_what_is_read_aloud_has_names_and_states(page: Path) -> None:
    unnamed = """[...document.querySelectorAll('input, select, button')].filter(
        e => !(e.labels && e.labels.length) && !e.textContent.trim()).map(e => e.id)"""

    async def look() -> None:
        async with new_tab() as tab:
            await tab.open(page)
            assert await tab.run(unnamed) == []
            assert (
                await tab.run("document.getElementById('count').getAttribute('role')") == "status"
            )
            assert (
                await tab.run("document.querySelectorAll('h3 > button[aria-expanded]').length") == 5
            )
            assert await tab.run("document.querySelectorAll('img:not([alt])').length") == 0

    asyncio.run(look())


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_and_text_is_readable(
    page: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    """No wider than the screen, no text under 12 pixels, contrast of 4.5 (WCAG AA)."""
    texts = [f"{'unbroken' * 40} {n}" for n in range(3)]
    run = write_report(write_run(tmp_path / "run", {"sft": texts, "ppo": texts}))
    measure = (Path(__file__).parent / "legibility.js").read_text(encoding="utf-8")

    async def look() -> None:
        for path in (page, run):
            async with new_tab() as tab:
                await tab.resize(width, 900, scheme)
                await tab.open(path)
                await tab.run(ALL_OPEN)
                dark = await tab.run("getComputedStyle(document.body).backgroundColor")
                assert (dark == "rgb(255, 255, 255)") is (scheme == "light")
                assert await tab.run("document.documentElement.scrollWidth") <= width
                assert json.loads(await tab.run(measure)) == []

    asyncio.run(look())


def test_print_is_black_on_white_without_controls_and_as_wide_as_the_paper(page: Path) -> None:
    async def look() -> None:
        async with new_tab() as tab:
            await tab.resize(1280, 900, "dark")
            await tab.open(page)
            await tab.run(ALL_OPEN)
            await tab.resize(700, 900)
            await tab.send(
                "Emulation.setEmulatedMedia",
                media="print",
                features=[{"name": "prefers-color-scheme", "value": "dark"}],
            )
            style = "getComputedStyle(document.body)"
            assert await tab.run(f"{style}.color") == "rgb(0, 0, 0)"
            assert await tab.run(f"{style}.backgroundColor") == "rgb(255, 255, 255)"
            assert await tab.run("document.getElementById('tools').offsetHeight") == 0
            blocks = "[...document.querySelectorAll('table, .question')]"
            assert await tab.run(f"{blocks}.filter(e => e.scrollWidth > 700).length") == 0
            assert len((await tab.send("Page.printToPDF"))["data"]) > 10_000

    asyncio.run(look())
