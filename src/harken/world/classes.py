"""The built-in corpus's sound classes: what each is called, how a caption speaks of it and what it shares with others.

Every class has a sound (`harken.world.sounds`), a drawn picture (`harken.world.pictures`) and one attribute that both
carry: its size. A big dog barks low and fills the picture; a small one barks high and takes a third of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True, slots=True)
class SoundClass:
    """One class of sound and the words for it.

    name: the key used everywhere ("dog"). display_name: as in class_labels_indices.csv ("Dog bark, woof").
    noun: "dog" (with `article`, "a" or "the"; "" for mass nouns). verb: third person ("barks"); gerund: "barking".
    big, small: the adjectives of its two sizes. is_steady: it can sound on behind others (rain, an engine).
    """

    name: str
    display_name: str
    article: str
    noun: str
    verb: str
    gerund: str
    big: str = "big"
    small: str = "small"
    is_steady: bool = False

    @property
    def mid(self) -> str:
        """A machine id of AudioSet's form, unique per class and not one of the real ones (those have no 0x prefix)."""
        return "/m/0x" + hashlib.blake2b(self.name.encode(), digest_size=2).hexdigest()

    def adjective(self, size: str) -> str:
        """The word for `size` ("big" or "small") that fits this class."""
        return self.big if size == "big" else self.small


_ALL = (
    SoundClass("dog", "Dog bark, woof", "a", "dog", "barks", "barking"),
    SoundClass("cat", "Cat, meow", "a", "cat", "meows", "meowing"),
    SoundClass("bird", "Bird chirp, tweet", "a", "bird", "chirps", "chirping"),
    SoundClass("rooster", "Rooster, cock-a-doodle-doo", "a", "rooster", "crows", "crowing"),
    SoundClass("cow", "Cattle, moo", "a", "cow", "moos", "mooing"),
    SoundClass("frog", "Frog croak", "a", "frog", "croaks", "croaking"),
    SoundClass("bee", "Bee, buzz", "a", "bee", "buzzes", "buzzing", is_steady=True),
    SoundClass("duck", "Duck, quack", "a", "duck", "quacks", "quacking"),
    SoundClass("bell", "Church bell", "a", "bell", "rings", "ringing"),
    SoundClass("telephone", "Telephone", "a", "telephone", "rings", "ringing"),
    SoundClass("ambulance", "Siren, ambulance", "an", "ambulance", "wails", "wailing"),
    SoundClass("car", "Car horn, honking", "a", "car", "honks", "honking"),
    SoundClass("train", "Train, steam", "a", "train", "chugs", "chugging", is_steady=True),
    SoundClass("motorcycle", "Motorcycle", "a", "motorcycle", "revs", "revving", is_steady=True),
    SoundClass("helicopter", "Helicopter", "a", "helicopter", "whirs", "whirring", is_steady=True),
    SoundClass("rain", "Rain", "", "rain", "falls", "falling", "heavy", "light", True),
    SoundClass("thunder", "Thunder", "", "thunder", "rumbles", "rumbling", "heavy", "light"),
    SoundClass("wind", "Wind, howl", "", "wind", "howls", "howling", "strong", "gentle", True),
    SoundClass("waves", "Ocean, waves and surf", "the", "sea", "roars", "roaring", "wild", "calm", True),
    SoundClass("fire", "Fire, crackle", "a", "fire", "crackles", "crackling", is_steady=True),
    SoundClass("hands", "Clapping", "a", "person", "claps", "clapping"),
    SoundClass("boots", "Walk, footsteps", "a", "walker", "strides", "striding"),
    SoundClass("door", "Knock on a door", "a", "door", "is knocked on", "being knocked on"),
    SoundClass("hammer", "Hammer, anvil", "a", "hammer", "pounds", "pounding"),
    SoundClass("saw", "Sawing", "a", "saw", "rasps", "rasping", is_steady=True),
    SoundClass("keyboard", "Typing, computer keyboard", "a", "keyboard", "clatters", "clattering"),
    SoundClass("clock", "Clock, tick-tock", "a", "clock", "ticks", "ticking", is_steady=True),
    SoundClass("glass", "Glass, shatter", "a", "glass", "shatters", "shattering"),
    SoundClass("drum", "Drum", "a", "drum", "beats", "beating"),
    SoundClass("piano", "Piano", "a", "piano", "plays", "playing"),
    SoundClass("trumpet", "Trumpet, brass", "a", "trumpet", "blares", "blaring"),
    SoundClass("tap", "Drip, water tap", "a", "tap", "drips", "dripping", is_steady=True),
)

CLASSES: dict[str, SoundClass] = {c.name: c for c in _ALL}
NAMES: tuple[str, ...] = tuple(CLASSES)
SIZES = ("big", "small")


def is_held_out(*names: str) -> bool:
    """Whether a set of classes is one that only test clips may hold: it contains a held-out pair.

    About a quarter of all pairs is held out, by a hash of their names and not by a seed, so that every corpus agrees.
    """
    ordered = sorted(set(names))
    return any(_is_held_out_pair(a, b) for k, a in enumerate(ordered) for b in ordered[k + 1 :])


@cache
def _is_held_out_pair(a: str, b: str) -> bool:
    return hashlib.blake2b(f"{a}+{b}".encode(), digest_size=1).digest()[0] % 4 == 0
