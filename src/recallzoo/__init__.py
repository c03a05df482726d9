"""Can a sequence mixer recall, where does a language model lose, and what closes the gap?"""

from recallzoo._version import __version__

__all__ = ["__version__"]
