"""Pictures with captions, as an image-text corpus would hold them, to train a small CLIP from nothing.

The pictures are those of the corpus's videos and the captions come from the same grammar, but about other scenes: what
is seen from left to right is told in that order. Nothing here knows the corpus's recordings or its test clips.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harken.world.captions import Scene, Sound, Then, along, caption, noun_phrase
from harken.world.classes import CLASSES, NAMES, SIZES
from harken.world.pictures import SCENES, Picture, compose

_PLACES = {
    "field": ("a green field", "a meadow under the sky"),
    "street": ("a street", "houses on a street"),
    "room": ("a room", "the wall and floor of a room"),
    "hills": ("rolling hills", "hills on the horizon"),
    "night": ("the night sky", "a dark night with stars"),
    "beach": ("a beach", "sand by the water"),
}
_EMPTY = ("{0}", "an empty scene, {0}", "nothing but {0}", "{0}, and nothing happens", "a picture of {0}")


def pairs(n: int, seed: int, size: tuple[int, int] = (160, 120)) -> Iterator[tuple[Picture, str]]:
    """`n` pictures, uint8 (height, width, 3), each with one caption.

    Of a hundred, about 55 show one object, 25 two, 10 three and 10 an empty scene. size: (width, height) in pixels.
    Pair k is the same for every n.
    """
    for k in range(n):
        rng = np.random.default_rng([seed, 7, k])
        place = SCENES[int(rng.integers(len(SCENES)))]
        count = int(rng.choice([1, 2, 3, 0], p=[0.55, 0.25, 0.1, 0.1]))
        names = rng.choice(len(NAMES), count, replace=False)
        sounds = [Sound(NAMES[int(i)], SIZES[int(rng.integers(2))]) for i in names]
        picture = compose([(s.name, s.size) for s in sounds], rng, size, place)
        yield picture, _caption(sounds, place, rng)


def _caption(sounds: list[Sound], place: str, rng: np.random.Generator) -> str:
    where = str(rng.choice(_PLACES[place]))
    if not sounds:
        return str(rng.choice(_EMPTY)).format(where)
    if rng.random() < 0.2:  # named, not told: "a picture of a big dog and a bell"
        things = " and ".join(noun_phrase(s, bool(rng.random() < 0.6)) for s in sounds)
        return str(rng.choice(("{0}", "a picture of {0}", "a drawing of {0}"))).format(things)
    # the size is named more often than in the clips: it is what tells two pictures of a class apart
    text = caption(_scene(sounds, rng), rng, size_share=0.6)
    return f"{text} in front of {where}" if rng.random() < 0.1 else text


def _scene(sounds: list[Sound], rng: np.random.Generator) -> Scene:
    """The grammar's tree for objects seen from left to right."""
    if len(sounds) == 1:
        return sounds[0]
    *first, last = sounds
    if not CLASSES[last.name].is_steady or rng.random() < 0.4:
        return Then(tuple(sounds))
    return along(first, last, rng)
