"""ISO-2022-CN (RFC 1922), which Python has no codec for: its GB 2312; characters of CNS 11643 are undecodable bytes."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = "iso2022_cn"
_TOKEN = re.compile(
    rb"\x1b\$(?P<set>[)*+].)|\x1bN(?P<second>..)|(?P<shift>[\x0e\x0f])|(?P<line>[\r\n])|(?P<escape>\x1b(?=[^$N]))"
    rb"|(?P<text>[^\x0e\x0f\x1b\r\n]+)",
    re.DOTALL,
)


class _Decoder(codecs.BufferedIncrementalDecoder):
    """Shifts and sets hold until the end of a line."""

    def __init__(self, errors: str = "strict") -> None:
        super().__init__(errors)
        self._set = b""  # what is shifted to
        self._is_shifted = False

    def _buffer_decode(self, input: Buffer, errors: str, final: bool) -> tuple[str, int]:
        data, parts, at = bytes(input), [], 0
        while (found := _TOKEN.match(data, at)) is not None:
            end = found.end()
            if found["text"] and self._is_shifted and end == len(data) and not final:
                end -= (end - at) % 2
            if end == at:
                break
            part = data[at:end]
            if found["set"]:
                self._set = found["set"] if found["set"].startswith(b")") else self._set  # the others are never GB 2312
            elif found["shift"]:
                self._is_shifted = part == b"\x0e"
            elif found["second"]:
                parts.append(self._odd(data, at, end))
            elif found["line"]:
                self._set, self._is_shifted = b"", False
                parts.append(part.decode("ascii"))
            elif self._is_shifted:
                parts.append(self._chinese(data, at, end))
            else:
                parts.append(part.decode("ascii", errors))
            at = end
        if final and at < len(data):
            parts.append(self._odd(data, at, len(data)))
            at = len(data)
        return "".join(parts), at

    def _chinese(self, data: bytes, start: int, end: int) -> str:
        if self._set not in (b")A", b")E"):  # ISO-IR-165 holds GB 2312
            return self._odd(data, start, end)
        return bytes(byte | 0x80 for byte in data[start:end]).decode("gb2312", self.errors)

    def _odd(self, data: bytes, start: int, end: int) -> str:
        handle = cast("Callable[[UnicodeDecodeError], tuple[str, int]]", codecs.lookup_error(self.errors))
        return handle(UnicodeDecodeError(NAME, data, start, end, "expected a character of GB 2312"))[0]


def _decode(input: Buffer, errors: str = "strict") -> tuple[str, int]:
    data = bytes(input)
    return _Decoder(errors).decode(data, final=True), len(data)


def _encode(text: str, errors: str = "strict") -> tuple[bytes, int]:
    raise NotImplementedError("nothing is written in ISO-2022-CN")


def _found(name: str) -> codecs.CodecInfo | None:
    if name.replace("-", "_") not in (NAME, "iso_2022_cn", "csiso2022cn"):
        return None
    return codecs.CodecInfo(_encode, _decode, incrementaldecoder=_Decoder, name=NAME)


codecs.register(_found)
