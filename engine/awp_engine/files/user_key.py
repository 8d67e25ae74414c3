"""A secret key of this user's, by which files that only this user's runs write are told from others."""

import os
import secrets
import stat
from pathlib import Path

_BYTES = 32


class KeyFileError(RuntimeError):
    """There is no key, and none can be made; the message is one line that says what to do."""


def key_path() -> Path:
    """$XDG_STATE_HOME/awp-engine/key, where the variable is an absolute path; else below ~/.local/state.

    Raises:
        KeyFileError: there is no home directory.
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".local" / "state") / "awp-engine" / "key"
    except RuntimeError:
        raise KeyFileError("no home directory to keep a key in: set XDG_STATE_HOME to a directory of yours") from None


def _read(path: Path) -> bytes:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(handle)
        key = os.read(handle, _BYTES + 1) if stat.S_ISREG(found.st_mode) else b""
        # a key that others can read or write proves nothing
        if len(key) != _BYTES or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise KeyFileError(
                f"{path}: expected a key of {_BYTES} bytes that is yours alone (chmod 600); delete it for a new one"
            )
        return key
    finally:
        os.close(handle)


def user_key() -> bytes:
    """The key; made, for this user's eyes alone, where there is none.

    Raises:
        KeyFileError: it cannot be read or made, or others can read it.
    """
    path = key_path()
    try:
        if not os.path.lexists(path):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = path.with_name(f"key-{secrets.token_hex(8)}")
            try:
                fresh.touch(mode=0o600, exist_ok=False)
                with fresh.open("wb") as file:
                    file.write(secrets.token_bytes(_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                # of several processes the first one's key stays
                os.link(fresh, path)
            except FileExistsError:
                pass
            finally:
                fresh.unlink(missing_ok=True)
        return _read(path)
    except OSError as error:
        raise KeyFileError(
            f"{path}: the key that this user's files are authenticated by cannot be kept: {error.strerror}; set "
            "XDG_STATE_HOME to a directory of yours"
        ) from None
