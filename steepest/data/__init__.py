"""Small real data that ships with the dependencies, and the user's own text."""

from steepest.data.batches import Epochs, InOrder, RandomWindows, Windows
from steepest.data.corpus import TextCorpus, text
from steepest.data.images import Digits, digits

__all__ = ["Digits", "Epochs", "InOrder", "RandomWindows", "TextCorpus", "Windows", "digits", "text"]
