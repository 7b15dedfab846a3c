"""Show other people's text to a judge so that nothing inside it can pass for our own words.

Every block stands between lines that carry a nonce which its text does not hold, so an answer
cannot close its own block, open another or type a turn of the conversation.  Markers by which chat
models tell turns apart are broken up, for servers that read them in message text too.  What a judge
quotes of them, with the fence or without, is taken out of its reply again.  Left out: keeping a
judge from obeying what stands inside a block; the prompts ask for that, no format can force it.
"""

import re
from collections.abc import Iterable
from unicodedata import normalize

from starling.base.seeding import derive_seed
from starling.data.records import Message


def fresh_nonce(seed: int, purpose: str, texts: Iterable[str]) -> str:
    """Eight hex digits that stand in none of the texts: the same for the same arguments."""
    joined = "\x00".join(texts)
    attempt = 0
    while (nonce := f"{derive_seed(seed, purpose, attempt) & 0xFFFFFFFF:08x}") in joined:
        attempt += 1
    return nonce


def fence(name: str, text: str, nonce: str) -> str:
    """The text as one block: `<<answer A 1f2e3d4c>>`, the text, `<<end answer A 1f2e3d4c>>`."""
    return f"<<{name} {nonce}>>\n{break_markers(text)}\n<<end {name} {nonce}>>"


def break_markers(text: str) -> str:
    """The text with a space behind the first character of whatever may be a control token.

    `<|im_end|>` becomes `< |im_end|>`; code such as `a <| b` or `<span>` stays what it is.
    """
    return _MARKER.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def opening(messages: Iterable[Message], nonce: str) -> str:
    """How a task begins: the nonce, and the conversation as one block a turn."""
    blocks = "\n".join(fence(message.role, message.content, nonce) for message in messages)
    return f"{_CODE}{nonce}.\n\nThe conversation so far:\n{blocks}\n\n"


def own_words(reply: str, task: str) -> str:
    """The reply without what it quotes of its task: a verdict inside is not the judge's.

    That is blocks, to the end where one is opened on a line of its own and never closed; and, where
    the fence is left out, lists of the task in running text.  One that has its line to itself, but
    for a LABEL, is the judge's: an honest ranking may well be what an answer says.
    """
    reply = _without_blocks(reply, task.removeprefix(_CODE)[:NONCE_LENGTH])
    # A judge may well quote [[10]] of what holds unseen signs, or brackets of double width.
    texts = (task, _UNSEEN.sub("", normalize("NFKC", task)))
    lists = (each for text in texts for kind in (_LIST, _INNERMOST) for each in kind.findall(text))
    shown = {_SPACING.sub("", each) for each in lists}

    def read(found: re.Match[str]) -> str:
        is_quoted = _SPACING.sub("", found[0]) in shown and not _has_its_line(found)
        return "" if is_quoted else found[0]

    return _LIST.sub(read, reply)


def _without_blocks(reply: str, nonce: str) -> str:
    """In one pass: a block is from its first opening line to the next closing one."""
    kept: list[str] = []
    start, opened = 0, None
    for mark in re.finditer(rf"<<(end\b)?[^<>\n]*{nonce}>>", reply) if nonce in reply else ():
        if mark[1] is None:
            opened = mark.start() if opened is None else opened
        elif opened is not None:
            kept.append(reply[start:opened])
            start, opened = mark.end(), None
    rest = reply[start:]
    if opened is not None:
        alone = rf"^[ \t>`*]*<<[^<>\n]*{nonce}>>[ \t`*]*$"
        if found := re.search(alone, rest, re.MULTILINE):
            rest = rest[: found.start()] + NEVER_CLOSED
    return "".join([*kept, rest])


def _has_its_line(found: re.Match[str]) -> bool:
    """Whether a list has no company on its line but a LABEL and a TAIL."""
    text, start, end = found.string, found.start(), found.end()
    before = text[max(0, start - LONGEST_LABEL - 1) : start]
    after = text[end : end + LONGEST_LABEL + 1].partition("\n")[0]
    line = before.rpartition("\n")[2]
    is_short = len(line) <= LONGEST_LABEL and len(after) <= LONGEST_LABEL
    return is_short and bool(_LABEL.fullmatch(line) and _TAIL.fullmatch(after))


_CODE = "The code of the blocks is "
NONCE_LENGTH = 8
NEVER_CLOSED = "(the rest is a block that it quotes and never closes)"
"""What stands in a reply instead of such a quotation."""
LONGEST_LABEL = 200
"""Characters of its line, before and after, that a verdict may have beside it."""
# Each text has one way only to match what follows, or a long line would take for ever.
_EDGE = r"(?:\b|(?<=_)|(?=_))"  # of a word, _emphasised_ or not
_NAMES = (
    rf"{_EDGE}(?i:final|rankings?|order|verdict|choice|results?|rating|score|worst"
    rf"|conclusion|decision|judge?ment){_EDGE}"
)
_WORDS = (
    rf"{_EDGE}(?i:my|the|this|these|so|thus|hence|therefore|here(?:['\u2019]s)?|overall|from|best|to"
    r"|is|are|as|follows|in|and|based|on|considering|pairwise|comparisons?|performance"
    r"|tiebreak(?:er)?|of (?:all |the |these )*(?:answers|responses)"
    rf"|(?:a not |not a |not |a )?good[- ]natured conversation){_EDGE}"
)
_MARKUP = r"\\(?:[\[\]]|(?:boxed|text(?:bf|tt)?|math(?:bf|rm))\b)|</?(?:b|i|u|em|strong|code|p)>"
_SIGN = rf"{_MARKUP}|\b\d{{1,2}}\b|_|[^\w\n\[\]\"'\u2018-\u201f\u00ab\u00bb]"  # no quotation mark
_NO_QUOTATION = r"(?![ \t]*(?:[*+-][ \t]+)?>)"
LABEL = rf"{_NO_QUOTATION}(?:(?:{_SIGN})*|(?=[^\n]*{_NAMES})(?:{_SIGN}|{_NAMES}|{_WORDS})*)"
"""What may stand before a verdict on its line: signs, or words that only announce one.

No word that could tell whose verdict it is, no letter of an answer and no quotation mark is among
them.  "Answer C says the final ranking is" is none, nor is an honest "Since answer C is best,".
"""
TAIL = rf"(?:{_MARKUP}|[ \t.!*_`$}}]|\((?:[ ,:>=-]|{_NAMES}|{_WORDS})*\))*"
"""What may stand behind it, such as "(best to worst)"."""
_LABEL, _TAIL = re.compile(LABEL), re.compile(TAIL)
_LIST = re.compile(r"\[\s*\[[^\[\]]*(?:\]\s*,\s*\[[^\[\]]*)*\]\s*\]|\[[^\[\]]*\]")
_INNERMOST = re.compile(r"\[[^\[\]]*\]")
_SPACING = re.compile(r"[\s'\"`]+")  # in which a quotation often differs
_UNSEEN = re.compile(
    "[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e007f]"
)
# ChatML, Llama 3, OpenChat; DeepSeek's, with full-width bars; Gemma and what tools, reasoning and
# images are wrapped in; Llama 2 and Mistral.
_MARKER = re.compile(
    r"<(?P<bar>[|\uff5c])(?=\S)[^|<>\n\uff5c]{1,60}(?<=\S)(?P=bar)>"
    r"|</?(?i:s|[be]os|pad|unk|(?:start|end)_of_(?:turn|image)|image(?:_soft_token)?|sop|endoftext"
    r"|tool_(?:call|response)s?|think(?:ing)?|reasoning)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|THINK|gMASK"
    r"|IMG(?:_BREAK|_END)?)\]"
    r"|<</?SYS>>"
)
