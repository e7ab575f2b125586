"""UTF-8 that was cut anywhere."""


def n_whole(text: bytes | bytearray) -> int:
    """Length of `text` without an incomplete UTF-8 character at its end."""
    for back in range(1, min(4, len(text) + 1)):
        byte = text[-back]
        if byte >= 0xC0:  # leads 2, 3 or 4 bytes
            return len(text) - back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else len(text)
        if byte < 0x80:
            break
    return len(text)
