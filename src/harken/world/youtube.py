"""yt-dlp's real YouTube extractor, pointed at the corpus's watch pages on loopback.

Only the source of the player response is replaced. Formats, error messages and their exceptions come from YoutubeIE's
own code, so what harken makes of them is tested against the yt-dlp that is installed.
"""

from __future__ import annotations

from typing import Any

from yt_dlp.extractor.youtube import YoutubeIE
from yt_dlp.extractor.youtube import _video as youtube_video
from yt_dlp.utils import ExtractorError

_CLIENT = "web_embedded"


class WatchPageIE(YoutubeIE):  # type: ignore[misc]  # yt-dlp has no types
    """Extracts `http://127.0.0.1:PORT/watch?v=ID`; asks nothing of any other host.

    Register it first: `ydl = YoutubeDL(params, auto_init=False); ydl.add_info_extractor(WatchPageIE())`. After yt-dlp's
    own extractors it would come too late, since the last of those takes any URL.
    """

    IE_NAME = "harken:world"
    _VALID_URL = r"http://(?:127\.0\.0\.1|localhost):\d+/watch\?v=(?P<id>[0-9A-Za-z_-]{11})$"

    def _real_initialize(self) -> None:
        """YouTube's cookies and consent are not needed on loopback."""

    def _initial_extract(
        self, url: str, smuggled_data: dict[str, Any], webpage_url: str, webpage_client: str, video_id: str
    ) -> tuple[str, dict[str, Any], dict[str, Any], bool, list[dict[str, Any]], None]:
        page = self._download_webpage(
            url, video_id, note="Downloading watch page", errnote="Unable to download watch page"
        )
        response = self._search_json(
            self._YT_INITIAL_PLAYER_RESPONSE_RE, page, "player response", video_id, default=None
        )
        if not response:
            raise ExtractorError("Failed to extract any player response")
        config = self._get_default_ytcfg(_CLIENT)
        streaming = response.setdefault("streamingData", {})
        # what _extract_player_responses would have noted of the client that was asked; no token is ever fetched
        marks = {
            youtube_video.STREAMING_DATA_CLIENT_NAME: _CLIENT,
            youtube_video.STREAMING_DATA_FETCH_GVS_PO_TOKEN: _no_token,
            youtube_video.STREAMING_DATA_PLAYER_TOKEN_PROVIDED: False,
            youtube_video.STREAMING_DATA_IS_PREMIUM_SUBSCRIBER: False,
        }
        for part in (streaming, *streaming.get("formats", ()), *streaming.get("adaptiveFormats", ())):
            part.update(marks)
        streaming[youtube_video.STREAMING_DATA_INNERTUBE_CONTEXT] = config["INNERTUBE_CONTEXT"]
        streaming[youtube_video.STREAMING_DATA_FETCH_SUBS_PO_TOKEN] = _no_token
        streaming[youtube_video.STREAMING_DATA_AVAILABLE_AT_TIMESTAMP] = self._get_available_at_timestamp(
            response, video_id, _CLIENT
        )
        return page, config, {}, False, [response], None


def _no_token(**_: Any) -> None:
    """No proof-of-origin token."""
