"""Show other people's text to a judge so that nothing inside it can pass for our own words.

Every block stands between lines that carry a nonce which its text does not hold, so an answer
cannot close its own block, open another or type a turn of the conversation.  Markers by which chat
models tell turns apart are broken up, for servers that read them in message text too.  What a judge
quotes of them, with the fence or without, is taken out of its reply again.  Left out: keeping a
judge from obeying what stands inside a block; the prompts ask for that, no format can force it.
"""

import re
from collections.abc import Iterable

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
    for a label, is the judge's: an honest ranking may well be what an answer says.
    """
    nonce = task.removeprefix(_CODE)[:NONCE_LENGTH]
    if nonce in reply:  # patterns of a new nonce are slow to compile
        name = rf"(?!end\b)[^<>\n]*{nonce}>>"
        closed = rf"<<{name}.*?<<end\b[^<>\n]*{nonce}>>"
        unclosed = rf"^[ \t>`*]*<<{name}[ \t`*]*$.*"
        reply = re.sub(closed, "", reply, flags=re.DOTALL)
        reply = re.sub(unclosed, "", reply, flags=re.DOTALL | re.MULTILINE)
    shown = ""

    def read(found: re.Match[str]) -> str:
        nonlocal shown
        if _is_announced(found):
            return found[0]
        shown = shown or _SPACING.sub("", task)
        return "" if _SPACING.sub("", found[0]) in shown else found[0]

    return _LIST.sub(read, reply)


def _is_announced(found: re.Match[str]) -> bool:
    """Whether a list has its line to itself, but for what announces it and names no answer."""
    before = found.string[max(0, found.start() - LONGEST_LABEL) : found.start()]
    before = before.rpartition("\n")[2]
    after = found.string[found.end() : found.end() + LONGEST_LABEL].partition("\n")[0]
    if re.search(r"[\w\[]", after) or ">" in before or re.search(r"\banswer [A-Z]\b", before):
        return False
    return not re.search(r"\w", before) or _ANNOUNCES.search(before) is not None


_CODE = "The code of the blocks is "
NONCE_LENGTH = 8
LONGEST_LABEL = 200
"""Characters of its line, before and after, by which a verdict is told from a quotation."""
_ANNOUNCES = re.compile(r"\b(?:final|rankings?|order|verdict|rating)\b", re.IGNORECASE)
_LIST = re.compile(r"\[\s*\[[^\[\]]*(?:\]\s*,\s*\[[^\[\]]*)*\]\s*\]|\[[^\[\]]*\]")
_SPACING = re.compile(r"[\s'\"`]+")  # in which a quotation often differs
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
