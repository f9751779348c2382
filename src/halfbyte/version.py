"""The version of the program, apart from ``halfbyte``, which knows every module."""

__version__ = "0.1.0"
