"""How types are checked during tests: as Python's typing says, an int is a good float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
