"""How annotations are checked at run time: as the typing documentation means them, so an int is a float where one is
expected. Arrays are checked by jaxtyping, by dtype."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
