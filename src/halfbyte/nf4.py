"""The former name of ``halfbyte.quant``, whose names are all here."""

from halfbyte.quant import *  # noqa: F403
from halfbyte.quant import __all__  # noqa: F401
