"""Codes (HMAC) by which what this user's runs have written is told from what came from elsewhere, or was changed."""

import hmac

from awp_engine.files.user_key import user_key


class Signer:
    """Makes and checks the codes of one kind of text.

    Args:
        kind: which; the code of one kind is none of another.

    Raises:
        KeyFileError: this user has no key, and none can be made.
    """

    def __init__(self, kind: str) -> None:
        self._kind, self._key = kind, user_key()

    def code(self, text: str) -> str:
        """What only this user can make, hexadecimal."""
        return hmac.digest(self._key, f"{self._kind}\n{text}".encode(), "sha256").hex()

    def made(self, code: object, text: str) -> bool:
        """Whether this user made `code` for `text`."""
        return isinstance(code, str) and hmac.compare_digest(self.code(text).encode(), code.encode(errors="replace"))
