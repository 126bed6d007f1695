"""The data files beside this one."""

from importlib.resources import files


def read_data(name: str) -> bytes:
    """The content of a data file of the catalogue."""
    return files(__package__).joinpath(name).read_bytes()
