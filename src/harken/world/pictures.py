"""Drawn pictures of the sound classes, and the neutral scenes shown when nothing sounds.

Each class is a small drawing in its own coordinates (x right, y down, -1..1), put at a drawn place and size, in drawn
colours, over a drawn scene. Everything lies in the middle square of the picture, so that a centre crop keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from harken.errors import ConfigError, unknown
from harken.world.classes import NAMES

Colour = tuple[int, int, int]
Picture = NDArray[np.uint8]

SCENES = ("field", "street", "room", "hills", "night", "beach")
_SUPERSAMPLING = 2  # drawn twice as large and averaged: smooth edges, which x264 codes in fewer bits
_HEIGHT = {"big": (0.80, 0.92), "small": (0.54, 0.62)}  # of the tile's shorter side


class Brush:
    """Draws in the object's coordinates onto the canvas."""

    def __init__(self, canvas: Image.Image, x: float, y: float, radius: float, mirrored: bool) -> None:
        self._draw = ImageDraw.Draw(canvas)
        self._x, self._y, self._r, self._sign = x, y, radius, -1.0 if mirrored else 1.0

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return self._x + self._sign * x * self._r, self._y + y * self._r

    def disc(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """An ellipse about (x, y)."""
        (cx, cy), w, h = self._at(x, y), abs(rx) * self._r, abs(ry) * self._r
        self._draw.ellipse((cx - w, cy - h, cx + w, cy + h), fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0.0) -> None:
        """A rectangle with its corners rounded by `radius`."""
        (ax, ay), (bx, by) = self._at(x0, y0), self._at(x1, y1)
        edges = (min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
        self._draw.rounded_rectangle(edges, radius * self._r, fill=fill)

    def shape(self, points: Sequence[tuple[float, float]], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([self._at(*p) for p in points], fill=fill)

    def stroke(self, points: Sequence[tuple[float, float]], fill: Colour, width: float = 0.1) -> None:
        """A polyline with round joints."""
        self._draw.line([self._at(*p) for p in points], fill=fill, width=max(1, round(width * self._r)), joint="curve")

    def arc(self, x: float, y: float, r: float, start: float, end: float, fill: Colour, width: float = 0.1) -> None:
        """Part of a circle; angles in turns, clockwise from the right."""
        turns = np.linspace(start, end, 14) * 2 * np.pi
        self.stroke([(x + r * float(np.cos(t)), y + r * float(np.sin(t))) for t in turns], fill, width)


def _shade(colour: Colour, factor: float) -> Colour:
    r, g, b = (min(255, max(0, round(c * factor))) for c in colour)
    return r, g, b


def _pick(rng: np.random.Generator, *colours: Colour) -> Colour:
    """One of `colours`, a little changed, so that no two pictures have quite the same."""
    base = colours[int(rng.integers(len(colours)))]
    r, g, b = (min(255, max(0, c + int(rng.integers(-16, 17)))) for c in base)
    return r, g, b


BLACK: Colour = (22, 22, 26)
WHITE: Colour = (245, 245, 242)
GREY: Colour = (128, 132, 138)


def _dog(b: Brush, rng: np.random.Generator) -> None:
    fur = _pick(rng, (150, 92, 45), (176, 118, 66))
    ear = _shade(fur, 0.55)
    b.disc(0, 0.05, 0.72, 0.78, fur)
    b.disc(-0.72, 0.05, 0.24, 0.62, ear)
    b.disc(0.72, 0.05, 0.24, 0.62, ear)
    b.disc(0, 0.42, 0.42, 0.34, _shade(fur, 1.5))
    b.disc(0, 0.22, 0.17, 0.12, BLACK)
    for x in (-0.3, 0.3):
        b.disc(x, -0.18, 0.1, 0.12, BLACK)
    b.box(-0.13, 0.52, 0.13, 0.95, (232, 92, 110), 0.12)


def _cat(b: Brush, rng: np.random.Generator) -> None:
    fur = _pick(rng, (96, 98, 108), (70, 70, 80))
    for s in (-1, 1):
        b.shape([(s * 0.82, -1.0), (s * 0.85, -0.1), (s * 0.12, -0.55)], fur)
        b.shape([(s * 0.72, -0.8), (s * 0.72, -0.3), (s * 0.35, -0.5)], (238, 160, 170))
    b.disc(0, 0.1, 0.88, 0.76, fur)
    for s in (-1, 1):
        b.disc(s * 0.36, -0.05, 0.22, 0.2, (150, 222, 60))
        b.disc(s * 0.36, -0.05, 0.06, 0.18, BLACK)
        for k in (-0.12, 0.02, 0.16):
            b.stroke([(s * 0.28, 0.38), (s * 1.0, 0.34 + k)], WHITE, 0.05)
    b.shape([(-0.12, 0.26), (0.12, 0.26), (0, 0.42)], (238, 120, 140))


def _bird(b: Brush, rng: np.random.Generator) -> None:
    body = _pick(rng, (40, 120, 225), (30, 145, 235))
    b.shape([(-0.4, 0.1), (-1.0, -0.35), (-0.95, 0.15), (-0.5, 0.4)], _shade(body, 0.6))
    b.disc(-0.05, 0.1, 0.62, 0.48, body)
    b.disc(0.48, -0.38, 0.38, 0.36, body)
    b.disc(0.05, 0.28, 0.4, 0.26, (245, 225, 190))
    b.shape([(0.82, -0.5), (1.0, -0.3), (0.8, -0.2)], (250, 180, 20))
    b.disc(0.56, -0.45, 0.09, 0.09, BLACK)
    b.shape([(-0.35, -0.1), (0.2, -0.05), (-0.5, 0.4)], _shade(body, 0.7))
    for x in (-0.12, 0.16):
        b.stroke([(x, 0.5), (x, 0.95)], (230, 140, 30), 0.09)


def _rooster(b: Brush, rng: np.random.Generator) -> None:
    body = _pick(rng, (246, 244, 236), (238, 226, 200))
    for k, c in enumerate(((20, 110, 60), (15, 70, 90), (10, 10, 40))):
        b.arc(-0.6, 0.1, 0.62 - 0.14 * k, 0.45, 0.85, c, 0.15)
    b.disc(-0.05, 0.32, 0.58, 0.46, body)
    b.shape([(0.15, 0.4), (0.2, -0.6), (0.66, -0.6), (0.5, 0.35)], body)
    b.disc(0.45, -0.55, 0.27, 0.25, body)
    for x, y in ((0.25, -0.8), (0.45, -0.88), (0.64, -0.78)):
        b.disc(x, y, 0.14, 0.17, (215, 25, 30))
    b.disc(0.58, -0.18, 0.12, 0.2, (215, 25, 30))
    b.shape([(0.68, -0.65), (1.0, -0.5), (0.68, -0.4)], (250, 190, 30))
    b.disc(0.48, -0.58, 0.07, 0.07, BLACK)
    for x in (-0.2, 0.15):
        b.stroke([(x, 0.7), (x, 1.0)], (240, 170, 40), 0.1)


def _cow(b: Brush, rng: np.random.Generator) -> None:
    skin, spot = _pick(rng, (240, 238, 232)), _pick(rng, (40, 32, 30), (60, 40, 30))
    for s in (-1, 1):
        b.shape([(s * 0.3, -0.6), (s * 0.75, -1.0), (s * 0.62, -0.5)], (225, 205, 150))
        b.disc(s * 0.82, -0.32, 0.26, 0.16, spot)
    b.disc(0, -0.1, 0.62, 0.7, skin)
    b.disc(-0.34, -0.28, 0.3, 0.36, spot)
    b.disc(0.3, -0.66, 0.22, 0.16, spot)
    b.disc(0, 0.55, 0.66, 0.4, (240, 165, 170))
    for s in (-1, 1):
        b.disc(s * 0.26, 0.52, 0.11, 0.14, (150, 70, 85))
        b.disc(s * 0.3, -0.2, 0.1, 0.12, BLACK if s > 0 else WHITE)


def _frog(b: Brush, rng: np.random.Generator) -> None:
    skin = _pick(rng, (60, 170, 50), (90, 190, 40))
    for s in (-1, 1):
        b.disc(s * 0.72, 0.6, 0.3, 0.26, _shade(skin, 0.7))
        b.disc(s * 0.5, -0.55, 0.34, 0.34, skin)
        b.disc(s * 0.5, -0.6, 0.22, 0.22, WHITE)
        b.disc(s * 0.5, -0.6, 0.1, 0.12, BLACK)
    b.disc(0, 0.15, 0.95, 0.62, skin)
    b.disc(0, 0.5, 0.6, 0.3, (220, 235, 150))
    b.stroke([(-0.7, 0.1), (-0.3, 0.26), (0.3, 0.26), (0.7, 0.1)], (30, 80, 20), 0.09)


def _bee(b: Brush, rng: np.random.Generator) -> None:
    yellow = _pick(rng, (250, 205, 20), (255, 190, 10))
    for x, y in ((-0.28, -0.55), (0.25, -0.6)):
        b.disc(x, y, 0.32, 0.42, (205, 230, 245))
    b.disc(0, 0.15, 0.8, 0.5, yellow)
    for x in (-0.42, -0.05, 0.3):
        b.box(x - 0.1, -0.28, x + 0.1, 0.58, BLACK)
    b.disc(0.72, 0.08, 0.28, 0.28, BLACK)
    b.disc(0.8, 0.0, 0.08, 0.08, WHITE)
    b.shape([(-0.78, 0.02), (-1.0, 0.15), (-0.78, 0.28)], BLACK)
    b.stroke([(0.8, -0.12), (0.95, -0.45)], BLACK, 0.07)


def _duck(b: Brush, rng: np.random.Generator) -> None:
    body, water = _pick(rng, (250, 215, 60), (255, 225, 90)), _pick(rng, (50, 130, 190))
    b.shape([(-0.9, -0.1), (-0.1, 0.1), (0.6, 0.0), (0.5, 0.6), (-0.6, 0.6)], body)
    b.disc(-0.1, 0.32, 0.66, 0.38, body)
    b.disc(0.42, -0.42, 0.4, 0.38, body)
    b.box(0.62, -0.42, 1.0, -0.22, (240, 110, 20), 0.1)
    b.disc(0.5, -0.52, 0.09, 0.1, BLACK)
    b.disc(-0.2, 0.25, 0.34, 0.2, _shade(body, 0.82))
    b.box(-1.0, 0.55, 1.0, 0.9, water, 0.12)


def _bell(b: Brush, rng: np.random.Generator) -> None:
    gold = _pick(rng, (218, 165, 32), (235, 185, 50))
    b.disc(0, 0.78, 0.2, 0.2, _shade(gold, 0.55))
    b.disc(0, -0.82, 0.16, 0.16, _shade(gold, 0.7))
    b.disc(0, -0.3, 0.5, 0.5, gold)
    b.shape([(-0.5, -0.3), (0.5, -0.3), (0.62, 0.3), (0.9, 0.62), (-0.9, 0.62), (-0.62, 0.3)], gold)
    b.box(-0.92, 0.55, 0.92, 0.72, _shade(gold, 0.7), 0.05)
    b.stroke([(-0.25, -0.45), (-0.35, 0.35)], (255, 240, 180), 0.12)


def _telephone(b: Brush, rng: np.random.Generator) -> None:
    red = _pick(rng, (205, 25, 35), (180, 20, 60))
    b.shape([(-0.45, -0.3), (0.45, -0.3), (0.9, 0.8), (-0.9, 0.8)], red)
    b.arc(0, -0.02, 0.72, 0.56, 0.94, _shade(red, 0.75), 0.24)
    for s in (-1, 1):
        b.box(s * 0.95, -0.4, s * 0.5, -0.05, _shade(red, 0.75), 0.1)
    b.disc(0, 0.3, 0.4, 0.38, WHITE)
    for k in range(8):
        a = k / 8 * 2 * np.pi
        b.disc(0.27 * float(np.cos(a)), 0.3 + 0.25 * float(np.sin(a)), 0.06, 0.06, BLACK)
    b.disc(0, 0.3, 0.12, 0.12, red)


def _ambulance(b: Brush, rng: np.random.Generator) -> None:
    white = _pick(rng, (248, 248, 246))
    b.box(-1.0, -0.55, 0.5, 0.5, white, 0.06)
    b.shape([(0.45, -0.3), (0.75, -0.3), (1.0, 0.1), (1.0, 0.5), (0.45, 0.5)], white)
    b.shape([(0.52, -0.2), (0.72, -0.2), (0.88, 0.08), (0.52, 0.08)], (90, 150, 190))
    b.box(-1.0, 0.28, 1.0, 0.4, (235, 80, 20))
    b.box(-0.38, -0.48, -0.18, 0.18, (225, 15, 25))
    b.box(-0.62, -0.26, 0.06, -0.04, (225, 15, 25))
    b.box(0.0, -0.8, 0.36, -0.55, (20, 60, 240), 0.08)
    for x in (-0.6, 0.58):
        b.disc(x, 0.52, 0.25, 0.25, BLACK)
        b.disc(x, 0.52, 0.1, 0.1, GREY)


def _car(b: Brush, rng: np.random.Generator) -> None:
    paint = _pick(rng, (220, 45, 30), (30, 150, 70), (150, 40, 160))
    b.shape([(-0.6, -0.05), (-0.35, -0.5), (0.3, -0.5), (0.6, -0.05)], paint)
    b.shape([(-0.45, -0.08), (-0.28, -0.4), (-0.04, -0.4), (-0.04, -0.08)], (190, 225, 240))
    b.shape([(0.06, -0.08), (0.06, -0.4), (0.25, -0.4), (0.45, -0.08)], (190, 225, 240))
    b.box(-1.0, -0.08, 1.0, 0.38, paint, 0.14)
    b.disc(0.9, 0.08, 0.1, 0.1, (255, 240, 120))
    for x in (-0.55, 0.55):
        b.disc(x, 0.4, 0.27, 0.27, BLACK)
        b.disc(x, 0.4, 0.12, 0.12, (190, 190, 190))


def _train(b: Brush, rng: np.random.Generator) -> None:
    body = _pick(rng, (35, 40, 48), (25, 60, 50))
    for x, y, r in ((0.35, -0.85, 0.17), (0.08, -0.9, 0.15), (-0.2, -0.95, 0.12)):
        b.disc(x, y, r * 1.3, r, (225, 225, 225))
    b.box(-0.95, -0.6, -0.3, 0.35, body, 0.03)
    b.box(-0.8, -0.42, -0.45, -0.1, (250, 225, 120))
    b.box(-0.35, -0.2, 0.85, 0.35, body, 0.2)
    b.box(0.35, -0.62, 0.58, -0.2, body)
    b.box(0.28, -0.72, 0.65, -0.58, (200, 40, 30))
    b.shape([(0.8, 0.3), (1.0, 0.72), (0.6, 0.72)], (200, 40, 30))
    for x in (-0.65, -0.1, 0.42):
        b.disc(x, 0.5, 0.25, 0.25, (200, 40, 30))
        b.disc(x, 0.5, 0.14, 0.14, BLACK)
    b.box(-1.0, 0.74, 1.0, 0.84, (90, 70, 60))


def _motorcycle(b: Brush, rng: np.random.Generator) -> None:
    paint = _pick(rng, (245, 120, 10), (20, 160, 200))
    for x in (-0.6, 0.6):
        b.disc(x, 0.38, 0.4, 0.4, BLACK)
        b.disc(x, 0.38, 0.24, 0.24, (205, 205, 210))
        b.disc(x, 0.38, 0.07, 0.07, BLACK)
    b.stroke([(-0.6, 0.38), (-0.1, 0.3), (0.3, -0.3), (0.6, 0.38)], GREY, 0.12)
    b.shape([(-0.35, -0.25), (0.35, -0.35), (0.2, 0.3), (-0.25, 0.35)], paint)
    b.box(-0.9, -0.34, -0.2, -0.16, BLACK, 0.08)
    b.stroke([(0.35, -0.3), (0.28, -0.72), (0.05, -0.75)], (60, 60, 65), 0.1)
    b.disc(0.5, -0.42, 0.13, 0.13, (255, 245, 170))
    b.stroke([(-0.1, 0.45), (-0.95, 0.55)], (190, 190, 190), 0.12)


def _helicopter(b: Brush, rng: np.random.Generator) -> None:
    paint = _pick(rng, (85, 110, 50), (70, 90, 60))
    b.box(-1.0, -0.62, 1.0, -0.52, BLACK)
    b.box(0.2, -0.55, 0.3, -0.25, BLACK)
    b.shape([(-0.98, -0.45), (-0.86, -0.45), (0.1, -0.1), (0.1, 0.2)], paint)
    b.disc(-0.9, -0.3, 0.1, 0.28, GREY)
    b.disc(0.3, 0.08, 0.6, 0.38, paint)
    b.shape([(0.42, -0.2), (0.68, -0.1), (0.86, 0.12), (0.42, 0.12)], (170, 215, 240))
    b.stroke([(-0.1, 0.72), (0.85, 0.72)], BLACK, 0.1)
    for x in (0.1, 0.55):
        b.stroke([(x, 0.4), (x, 0.72)], BLACK, 0.08)


def _cloud(b: Brush, colour: Colour) -> None:
    b.disc(-0.45, -0.42, 0.46, 0.36, colour)
    b.disc(0.0, -0.58, 0.5, 0.4, colour)
    b.disc(0.48, -0.4, 0.46, 0.34, colour)
    b.box(-0.8, -0.42, 0.8, -0.1, colour, 0.15)


def _rain(b: Brush, rng: np.random.Generator) -> None:
    _cloud(b, _pick(rng, (150, 165, 185), (170, 180, 195)))
    blue = _pick(rng, (30, 90, 220))
    for k, x in enumerate((-0.7, -0.35, 0.0, 0.35, 0.7)):
        for y in (0.1, 0.55):
            dy = 0.12 if k % 2 else 0.0
            b.stroke([(x, y + dy), (x - 0.12, y + dy + 0.26)], blue, 0.1)


def _thunder(b: Brush, rng: np.random.Generator) -> None:
    _cloud(b, _pick(rng, (62, 55, 82), (50, 50, 66)))
    bolt = _pick(rng, (255, 235, 40))
    b.shape([(0.1, -0.15), (-0.4, 0.45), (-0.08, 0.42), (-0.25, 1.0), (0.42, 0.22), (0.1, 0.25), (0.35, -0.15)], bolt)


def _wind(b: Brush, rng: np.random.Generator) -> None:
    leaf, pale = _pick(rng, (50, 120, 55), (80, 130, 40)), (228, 240, 250)
    b.stroke([(-0.55, 1.0), (-0.45, 0.4), (-0.05, -0.15)], (105, 70, 40), 0.17)
    b.shape([(-0.45, -0.2), (-0.2, -0.75), (0.45, -0.85), (1.0, -0.35), (0.6, -0.1), (0.0, 0.12)], leaf)
    for y, x in ((-0.95, -0.85), (0.4, 0.05), (0.75, -0.25)):
        b.stroke([(x, y), (x + 0.6, y)], pale, 0.1)
        b.arc(x + 0.6, y - 0.13, 0.13, 0.25, -0.4, pale, 0.1)


def _waves(b: Brush, rng: np.random.Generator) -> None:
    sea = _pick(rng, (10, 85, 150), (0, 105, 140))
    x = np.linspace(-1, 1, 41)
    for k, y in enumerate((-0.45, 0.0, 0.45)):
        colour = _shade(sea, 1.45 - 0.3 * k)
        crest = y - 0.22 * np.abs(np.sin(2.2 * np.pi * (x / 2 + 0.17 * k)))
        b.shape([*zip(x.tolist(), crest.tolist(), strict=True), (1.0, 0.95), (-1.0, 0.95)], colour)
        b.stroke(list(zip(x.tolist(), crest.tolist(), strict=True)), WHITE, 0.09)


def _fire(b: Brush, rng: np.random.Generator) -> None:
    outer = _pick(rng, (235, 70, 10), (245, 90, 0))
    b.stroke([(-0.8, 0.95), (0.8, 0.65)], (95, 60, 35), 0.2)
    b.stroke([(-0.8, 0.65), (0.8, 0.95)], (80, 50, 30), 0.2)
    b.shape([(-0.7, 0.4), (-0.5, -0.4), (-0.28, -0.05), (0.0, -1.0), (0.3, -0.1), (0.52, -0.5), (0.7, 0.4)], outer)
    b.disc(0, 0.42, 0.7, 0.38, outer)
    b.shape([(-0.4, 0.45), (-0.18, 0.0), (0.0, -0.35), (0.2, 0.05), (0.4, 0.45)], (255, 170, 20))
    b.disc(0, 0.46, 0.4, 0.25, (255, 170, 20))
    b.disc(0, 0.5, 0.2, 0.18, (255, 245, 150))


def _hands(b: Brush, rng: np.random.Generator) -> None:
    skin = _pick(rng, (240, 190, 150), (150, 100, 70), (200, 150, 110))
    sleeve = _pick(rng, (60, 60, 150), (140, 40, 90))
    for s in (-1, 1):
        b.shape([(s * 0.55, 0.5), (s * 1.0, 0.4), (s * 1.0, 1.0), (s * 0.65, 1.0)], sleeve)
        b.shape([(s * 0.2, 0.55), (s * 0.16, -0.1), (s * 0.62, 0.0), (s * 0.85, 0.5)], skin)
        for k in range(4):
            x = 0.2 + 0.14 * k
            b.stroke([(s * x, 0.05), (s * (x + 0.12), -0.72 + 0.1 * abs(k - 1))], skin, 0.13)
        b.stroke([(s * 0.3, 0.35), (s * 0.08, 0.0)], skin, 0.14)
    for x, y in ((0.0, -0.95), (-0.16, -0.8), (0.16, -0.8)):
        b.stroke([(x, y), (x * 0.4, y + 0.22)], (255, 220, 60), 0.07)


def _boots(b: Brush, rng: np.random.Generator) -> None:
    leather = _pick(rng, (110, 62, 25), (90, 45, 20))
    for x, y in ((-0.5, -0.1), (0.35, 0.1)):
        b.box(x - 0.28, y - 0.8, x + 0.14, y + 0.55, leather, 0.05)
        b.disc(x + 0.25, y + 0.42, 0.38, 0.22, leather)
        b.box(x - 0.32, y + 0.55, x + 0.62, y + 0.72, BLACK, 0.05)
        b.box(x - 0.3, y - 0.82, x + 0.16, y - 0.64, (215, 190, 140))
        for k in range(3):
            b.stroke([(x - 0.05, y - 0.45 + 0.25 * k), (x + 0.14, y - 0.4 + 0.25 * k)], (245, 225, 90), 0.06)


def _door(b: Brush, rng: np.random.Generator) -> None:
    wood = _pick(rng, (140, 60, 35), (35, 105, 95))
    b.box(-0.68, -1.0, 0.68, 1.0, (235, 228, 210))
    b.box(-0.55, -0.88, 0.55, 1.0, wood)
    for x0, x1 in ((-0.42, -0.06), (0.06, 0.42)):
        b.box(x0, -0.72, x1, -0.1, _shade(wood, 0.68))
        b.box(x0, 0.15, x1, 0.8, _shade(wood, 0.68))
    b.disc(0.42, 0.03, 0.1, 0.1, (250, 215, 80))


def _hammer(b: Brush, rng: np.random.Generator) -> None:
    steel, wood = _pick(rng, (105, 112, 125)), _pick(rng, (225, 170, 95), (240, 190, 110))
    b.stroke([(-0.75, 0.95), (0.2, -0.35)], wood, 0.24)
    b.shape([(-0.28, -0.62), (0.06, -0.98), (0.86, -0.28), (0.52, 0.08)], steel)
    b.shape([(-0.28, -0.62), (-0.06, -0.4), (-0.5, -0.28), (-0.62, -0.36)], _shade(steel, 0.7))
    b.stroke([(0.0, -0.82), (0.72, -0.2)], _shade(steel, 1.6), 0.07)


def _saw(b: Brush, rng: np.random.Generator) -> None:
    steel, grip = _pick(rng, (200, 206, 214)), _pick(rng, (235, 150, 40), (200, 60, 40))
    teeth = [(0.25 - 0.125 * k, 0.34 if k % 2 else 0.12) for k in range(11)]
    b.shape([(0.3, -0.45), (-1.0, -0.12), (-1.0, 0.12), *reversed(teeth), (0.3, 0.12)], steel)
    b.shape([(0.2, -0.5), (0.75, -0.62), (1.0, -0.2), (0.9, 0.5), (0.35, 0.4)], grip)
    b.disc(0.62, -0.05, 0.17, 0.22, _shade(grip, 0.35))
    b.box(-0.95, 0.5, 0.3, 0.85, (170, 120, 70), 0.05)


def _keyboard(b: Brush, rng: np.random.Generator) -> None:
    case, key = _pick(rng, (60, 64, 74), (80, 84, 92)), _pick(rng, (235, 238, 240), (210, 225, 240))
    b.box(-1.0, -0.55, 1.0, 0.55, case, 0.1)
    for r in range(3):
        for c in range(6):
            x, y = -0.9 + 0.305 * c, -0.45 + 0.24 * r
            b.box(x, y, x + 0.24, y + 0.18, key, 0.04)
    b.box(-0.6, 0.28, 0.6, 0.46, key, 0.04)


def _clock(b: Brush, rng: np.random.Generator) -> None:
    rim = _pick(rng, (20, 130, 120), (120, 60, 20), (90, 20, 100))
    b.disc(0, 0, 0.95, 0.95, rim)
    b.disc(0, 0, 0.76, 0.76, WHITE)
    for k in range(12):
        a = k / 12 * 2 * np.pi
        x, y = float(np.cos(a)), float(np.sin(a))
        b.stroke([(0.58 * x, 0.58 * y), (0.7 * x, 0.7 * y)], BLACK, 0.08)
    minute, hour = rng.uniform(0, 2 * np.pi, 2)
    b.stroke([(0, 0), (0.55 * float(np.cos(minute)), 0.55 * float(np.sin(minute)))], BLACK, 0.08)
    b.stroke([(0, 0), (0.36 * float(np.cos(hour)), 0.36 * float(np.sin(hour)))], BLACK, 0.12)
    b.disc(0, 0, 0.1, 0.1, (215, 30, 30))


def _glass(b: Brush, rng: np.random.Generator) -> None:
    pane, wine = (215, 240, 245), _pick(rng, (120, 15, 60), (150, 20, 40))
    b.shape([(-0.55, -0.95), (0.55, -0.95), (0.42, -0.1), (0.08, 0.15), (-0.08, 0.15), (-0.42, -0.1)], pane)
    b.shape([(-0.5, -0.55), (0.5, -0.55), (0.4, -0.12), (0.06, 0.1), (-0.06, 0.1), (-0.4, -0.12)], wine)
    b.box(-0.07, 0.1, 0.07, 0.75, pane)
    b.disc(0, 0.8, 0.45, 0.12, pane)
    for x, y in ((-0.85, -0.5), (0.8, -0.3), (0.75, 0.45), (-0.75, 0.4)):
        b.shape([(x - 0.15, y + 0.1), (x + 0.02, y - 0.2), (x + 0.17, y + 0.14)], pane)
    b.stroke([(-0.1, -0.95), (0.08, -0.7), (-0.08, -0.5), (0.1, -0.25)], BLACK, 0.06)


def _drum(b: Brush, rng: np.random.Generator) -> None:
    shell = _pick(rng, (30, 50, 170), (190, 30, 60))
    b.box(-0.8, -0.2, 0.8, 0.75, shell)
    b.disc(0, 0.75, 0.8, 0.22, shell)
    zigzag = [(-0.8 + 0.32 * k, 0.0 if k % 2 else 0.8) for k in range(6)]
    b.stroke(zigzag, (250, 225, 120), 0.09)
    b.disc(0, -0.2, 0.84, 0.28, (250, 225, 120))
    b.disc(0, -0.22, 0.74, 0.22, WHITE)
    for s in (-1, 1):
        b.stroke([(s * 0.95, -0.95), (s * 0.15, -0.25)], (170, 110, 50), 0.1)
        b.disc(s * 0.15, -0.25, 0.1, 0.1, (170, 110, 50))


def _piano(b: Brush, rng: np.random.Generator) -> None:
    wood = _pick(rng, (28, 24, 28), (75, 35, 25))
    b.box(-0.95, -0.85, 0.95, 0.95, wood, 0.05)
    b.box(-0.72, -0.68, 0.72, -0.25, _shade(wood, 2.2), 0.03)
    b.box(-0.95, -0.1, 0.95, 0.42, WHITE)
    for k in range(1, 8):
        x = -0.95 + 1.9 * k / 8
        b.stroke([(x, -0.1), (x, 0.42)], BLACK, 0.04)
        if k not in (3, 7):
            b.box(x - 0.07, -0.1, x + 0.07, 0.18, BLACK)


def _trumpet(b: Brush, rng: np.random.Generator) -> None:
    brass = _pick(rng, (240, 185, 40), (250, 200, 70))
    b.stroke([(-1.0, -0.1), (0.5, -0.1)], brass, 0.15)
    b.shape([(0.3, -0.18), (0.62, -0.25), (1.0, -0.62), (1.0, 0.42), (0.62, 0.05), (0.3, -0.02)], brass)
    b.stroke([(-0.55, -0.1), (-0.62, 0.35), (0.1, 0.35), (0.15, -0.1)], brass, 0.13)
    for x in (-0.42, -0.2, 0.02):
        b.box(x - 0.07, -0.48, x + 0.07, 0.45, _shade(brass, 0.72), 0.03)
        b.disc(x, -0.52, 0.09, 0.06, WHITE)
    b.disc(-1.0, -0.1, 0.06, 0.14, _shade(brass, 0.6))


def _tap(b: Brush, rng: np.random.Generator) -> None:
    chrome, drop = _pick(rng, (175, 185, 195), (150, 160, 175)), _pick(rng, (40, 140, 235))
    b.box(-0.98, -0.5, 0.3, -0.15, chrome, 0.06)
    b.box(0.0, -0.5, 0.38, 0.15, chrome, 0.12)
    b.box(-0.05, 0.05, 0.43, 0.2, _shade(chrome, 0.7))
    b.box(-0.52, -0.8, -0.32, -0.45, _shade(chrome, 0.75))
    b.box(-0.82, -0.98, -0.02, -0.78, (215, 40, 45), 0.08)
    for y, r in ((0.5, 0.15), (0.88, 0.1)):
        b.disc(0.19, y, r * 0.8, r, drop)
        b.shape([(0.19, y - 2.1 * r), (0.19 - 0.7 * r, y - 0.3 * r), (0.19 + 0.7 * r, y - 0.3 * r)], drop)


DRAWINGS: dict[str, Callable[[Brush, np.random.Generator], None]] = {
    "dog": _dog,
    "cat": _cat,
    "bird": _bird,
    "rooster": _rooster,
    "cow": _cow,
    "frog": _frog,
    "bee": _bee,
    "duck": _duck,
    "bell": _bell,
    "telephone": _telephone,
    "ambulance": _ambulance,
    "car": _car,
    "train": _train,
    "motorcycle": _motorcycle,
    "helicopter": _helicopter,
    "rain": _rain,
    "thunder": _thunder,
    "wind": _wind,
    "waves": _waves,
    "fire": _fire,
    "hands": _hands,
    "boots": _boots,
    "door": _door,
    "hammer": _hammer,
    "saw": _saw,
    "keyboard": _keyboard,
    "clock": _clock,
    "glass": _glass,
    "drum": _drum,
    "piano": _piano,
    "trumpet": _trumpet,
    "tap": _tap,
}


def _paint_scene(canvas: Image.Image, scene: str, rng: np.random.Generator) -> None:
    """Fill `canvas` with one of SCENES. Muted colours and large shapes: a background, not an object."""
    draw, (w, h) = ImageDraw.Draw(canvas), canvas.size
    horizon = h * float(rng.uniform(0.5, 0.72))

    def band(top: float, colour: Colour) -> None:
        draw.rectangle((0, top, w, h), fill=colour)

    if scene == "field":
        band(0, _pick(rng, (176, 212, 238), (205, 222, 232)))
        band(horizon, _pick(rng, (140, 176, 104), (170, 188, 120)))
    elif scene == "street":
        band(0, _pick(rng, (188, 190, 198), (206, 200, 192)))
        x = 0.0
        while x < w:
            wide = float(rng.uniform(0.14, 0.3)) * w
            draw.rectangle((x, horizon * float(rng.uniform(0.25, 0.6)), x + wide, h), fill=_pick(rng, (168, 158, 152)))
            x += wide
        band(horizon, _pick(rng, (112, 114, 120)))
    elif scene == "room":
        band(0, _pick(rng, (226, 212, 190), (206, 218, 206), (220, 206, 216)))
        band(horizon, _pick(rng, (168, 136, 108), (150, 128, 116)))
    elif scene == "hills":
        band(0, _pick(rng, (236, 216, 190), (212, 222, 238)))
        for k in range(3):
            x, r = float(rng.uniform(0, 1)) * w, float(rng.uniform(0.5, 0.9)) * w
            top = horizon + 0.1 * k * h
            draw.ellipse((x - r, top, x + r, top + 2 * r), fill=_pick(rng, (156 - 18 * k, 172 - 18 * k, 140 - 18 * k)))
    elif scene == "night":
        band(0, _pick(rng, (58, 66, 104), (70, 62, 96)))
        for _ in range(10):
            x, y = float(rng.uniform(0, w)), float(rng.uniform(0, horizon))
            draw.ellipse((x, y, x + 3, y + 3), fill=(214, 214, 190))
        band(horizon, _pick(rng, (52, 62, 66)))
    elif scene == "beach":
        band(0, _pick(rng, (190, 226, 236)))
        band(horizon * 0.85, _pick(rng, (128, 184, 198)))
        band(horizon, _pick(rng, (230, 212, 166)))
    else:
        raise unknown("scene", scene, SCENES)


def compose(
    objects: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    size: tuple[int, int],
    scene: str | None = None,
) -> Picture:
    """One picture of up to four `objects`, (class name, "big" or "small"), from left to right, the upper line first.

    size: (width, height) in pixels. scene: one of SCENES; drawn if None. No objects: the scene alone.
    Returns uint8 (height, width, 3). Raises ConfigError for an unknown class, size or scene.
    """
    width, height = size
    if len(objects) > 4:
        raise ConfigError(f"a picture holds at most 4 objects, {len(objects)} were asked for.")
    canvas = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    _paint_scene(canvas, scene if scene is not None else SCENES[int(rng.integers(len(SCENES)))], rng)
    w, h = canvas.size
    square = min(w, h)
    # two stand side by side; three or four take the quarters of the square, which leaves them larger than abreast
    columns, lines = min(2, max(1, len(objects))), 1 if len(objects) <= 2 else 2
    tile_w, tile_h = square / columns, square / lines
    left, top = (w - square) / 2, (h - square) / 2
    for k, (name, how_big) in enumerate(objects):
        if name not in DRAWINGS:
            raise unknown("picture", name, NAMES)
        if how_big not in _HEIGHT:
            raise unknown("size", how_big, _HEIGHT)
        radius = 0.5 * min(tile_w, tile_h) * float(rng.uniform(*_HEIGHT[how_big]))
        slack_x, slack_y = tile_w / 2 - radius, tile_h / 2 - radius
        x = left + (k % columns + 0.5) * tile_w + slack_x * float(rng.uniform(-0.5, 0.5))
        y = top + (k // columns + 0.5) * tile_h + slack_y * float(rng.uniform(-0.5, 0.5))
        DRAWINGS[name](Brush(canvas, x, y, radius, bool(rng.random() < 0.5)), rng)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.uint8)


def draw(
    class_name: str,
    rng: np.random.Generator,
    size: tuple[int, int] = (160, 120),
    how_big: str = "big",
    scene: str | None = None,
) -> Picture:
    """One object of `class_name`, `how_big` "big" or "small", over a scene: uint8 (height, width, 3)."""
    return compose([(class_name, how_big)], rng, size, scene)
