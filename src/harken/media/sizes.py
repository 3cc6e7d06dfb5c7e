"""The sizes of what is stored of a clip's sound, for those who read it without computing it (and without torch)."""

from __future__ import annotations

from typing import Final

FBANK_MELS: Final = 128
LOGMEL_MELS: Final = 64
LOGMEL_RATE_HZ: Final = 32_000
LOGMEL_SHORTEST: Final = 513  # samples: half a window is reflected at each end
