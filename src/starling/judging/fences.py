"""Show other people's text to a judge so that nothing inside it can pass for our own words.

Every block stands between lines that carry a nonce which its text does not hold, so an answer
cannot close its own block, open another or type a turn of the conversation.  Left out: keeping a
judge from obeying what stands inside a block; the prompts ask for that, no format can force it.
"""

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
    return f"<<{name} {nonce}>>\n{text}\n<<end {name} {nonce}>>"


def opening(messages: Iterable[Message], nonce: str) -> str:
    """How a task begins: the nonce, and the conversation as one block a turn."""
    blocks = "\n".join(fence(message.role, message.content, nonce) for message in messages)
    return f"The code of the blocks is {nonce}.\n\nThe conversation so far:\n{blocks}\n\n"
