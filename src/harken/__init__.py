"""harken: find the sound a sentence describes, and the sentence that describes a sound."""

__version__ = "0.1.0"
