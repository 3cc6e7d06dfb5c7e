"""Captions from a small grammar with order and simultaneity: "a big dog barks, then a bell rings while rain falls".

A caption describes a tree of what sounds: a `Sound`, sounds in turn (`Then`) or at once (`Along`). Every phrasing keeps
the order and the simultaneity, so the words are as true as the planted sounds. The pictures' captions
(`harken.world.picture_captions`) use the same grammar, so that a text tower trained on them knows its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harken.world.classes import CLASSES


@dataclass(frozen=True, slots=True)
class Sound:
    """One sounding thing: a class name and its size ("big" or "small")."""

    name: str
    size: str


@dataclass(frozen=True, slots=True)
class Then:
    """Two or three parts, one after another."""

    parts: tuple[Sound | Along, ...]


@dataclass(frozen=True, slots=True)
class Along:
    """`main` sounds while `other` does."""

    main: Sound | Then
    other: Sound


Scene = Sound | Then | Along


def drawn(n: int, seed: int) -> list[str]:
    """`n` captions of one to three sounds, as many as such a corpus has many times over, to train a text tower on.

    They are about scenes of their own: nothing here knows the corpus's recordings. Caption k is the same for every n.
    """
    return [caption(_draw(rng), rng) for rng in (np.random.default_rng([seed, 8, k]) for k in range(n))]


def _draw(rng: np.random.Generator) -> Scene:
    names = rng.choice(len(CLASSES), int(rng.choice([1, 2, 3], p=[0.3, 0.4, 0.3])), replace=False)
    sounds = [Sound(list(CLASSES)[int(i)], ("big", "small")[int(rng.integers(2))]) for i in names]
    if len(sounds) == 1:
        return sounds[0]
    *first, last = sounds
    return Then(tuple(sounds)) if rng.random() < 0.5 else along(first, last, rng)


def along(first: Sequence[Sound], last: Sound, rng: np.random.Generator) -> Scene:
    """One or two sounds with another going on behind: behind both, or behind the second."""
    if len(first) == 1:
        return Along(first[0], last)
    return Along(Then(tuple(first)), last) if rng.random() < 0.5 else Then((first[0], Along(first[1], last)))


def noun_phrase(sound: Sound, with_size: bool) -> str:
    """ "a big dog", "heavy rain", "an ambulance"."""
    c = CLASSES[sound.name]
    words = [c.adjective(sound.size), c.noun] if with_size else [c.noun]
    article = c.article
    if article in ("a", "an"):
        article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words] if article else words)


def _clause(sound: Sound, rng: np.random.Generator, with_size: bool) -> str:
    c = CLASSES[sound.name]
    subject = noun_phrase(sound, with_size)
    return f"{subject} is {c.gerund}" if rng.random() < 0.35 else f"{subject} {c.verb}"


def _nominal(sound: Sound, with_size: bool) -> str:
    return f"{noun_phrase(sound, with_size)} {CLASSES[sound.name].gerund}"


def _say_then(clauses: list[str], nominals: list[str | None], rng: np.random.Generator) -> str:
    if len(clauses) == 3:
        forms = [
            "{0}, then {1}, then {2}",
            "{0}, then {1}, and finally {2}",
            "first {0}, then {1}, and at last {2}",
            "{0}, after that {1}, and then {2}",
        ]
        return str(rng.choice(forms)).format(*clauses)
    forms = ["{0}, then {1}", "{0} and then {1}", "{0} before {1}", "first {0}, then {1}", "{1} after {0}"]
    if nominals[1]:
        forms.append("{0}, followed by {n}")
    return str(rng.choice(forms)).format(*clauses, n=nominals[1])


def caption(scene: Scene, rng: np.random.Generator, size_share: float = 0.5) -> str:
    """One caption of `scene`; each sound's size is named with the probability `size_share`."""
    match scene:
        case Sound():
            with_size = bool(rng.random() < size_share)
            if rng.random() < 0.2:
                return _nominal(scene, with_size)
            return _clause(scene, rng, with_size)
        case Then(parts):
            texts: list[str] = []
            nominals: list[str | None] = []
            for part in parts:
                sized = bool(rng.random() < size_share)
                texts.append(
                    _clause(part, rng, sized) if isinstance(part, Sound) else _say_along(part, rng, size_share)
                )
                nominals.append(_nominal(part, sized) if isinstance(part, Sound) else None)
            return _say_then(texts, nominals, rng)
        case Along():
            return _say_along(scene, rng, size_share)


def _say_along(scene: Along, rng: np.random.Generator, size_share: float) -> str:
    sized = bool(rng.random() < size_share)
    other, nominal = _clause(scene.other, rng, sized), _nominal(scene.other, sized)
    if isinstance(scene.main, Then):
        inner = caption(scene.main, rng, size_share)
        forms = ["while {o}, {m}", "{m}, with {n} all the while", "{m}, all while {o}"]
    else:
        inner = _clause(scene.main, rng, bool(rng.random() < size_share))
        forms = ["{m} while {o}", "{m} as {o}", "{m} with {n} in the background", "{m} and {o} at the same time"]
    return str(rng.choice(forms)).format(m=inner, o=other, n=nominal)


def paraphrases(scene: Scene, n: int, rng: np.random.Generator) -> tuple[str, ...]:
    """`n` captions of one scene, different from each other as far as the grammar allows."""
    found: list[str] = []
    for _ in range(12 * n):
        if len(found) == n:
            break
        text = caption(scene, rng)
        if text not in found:
            found.append(text)
    while len(found) < n:  # a lone sound has few phrasings; real corpora repeat captions as well
        found.append(caption(scene, rng))
    return tuple(found)
