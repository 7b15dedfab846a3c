"""Read a stream to its end, as the tests of everything that streams do."""


def drain(pieces):
    """All pieces of a stream, and what it returns."""
    got = []
    while True:
        try:
            got.append(next(pieces))
        except StopIteration as end:
            return got, end.value
