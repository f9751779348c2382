"""The version of the program, apart from ``halfbyte``, which knows every module, and its record."""

__version__ = "0.1.0"

VERSION_KEY = "halfbyte_version"
"""The field of the ``config.json`` of every model that we write, with the version that wrote it."""
