"""The answers to one question so far, kept so that whoever asks it again goes on where it ended."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from awp_engine.checkpoint.files import read_file
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.signed import Signer
from awp_engine.files.user_key import KeyFileError

_BYTES = 2**30


class Journal:
    """A file with a line for every answer, each with a code that only this user can make.

    That an answer is right cannot be seen without finding it again. So a line carries an HMAC of the question and of
    itself; from the first one that is not believed on, answers are found anew.

    Args:
        directory: an existing one.
        kind: of the question, such as certify; the file's name begins with it.
        question: all that the answers depend on, as JSON has it.
        say: is told what is wrong with the file.

    Attributes:
        path: of the file, which may not exist.
    """

    def __init__(self, directory: Path, kind: str, question: Mapping[str, Any], say: Callable[[str], None]) -> None:
        text, self._say = json.dumps(question, sort_keys=True), say
        self.path = directory / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        try:
            self._signer: Signer | None = Signer(f"{kind}\n{text}")
        except KeyFileError as error:
            self._signer = None
            say(f"no progress will be saved: {error}")

    def load(self) -> list[Any]:
        """What was saved, in order; the file then holds nothing else.

        Raises:
            CheckpointError: the file is no regular one, or larger than a journal gets.
        """
        if self._signer is None or not self.path.exists():
            return []
        found: list[Any] = []
        lines = read_file(self.path, limit=_BYTES).decode(errors="replace").splitlines(keepends=True)
        for line in lines:
            try:
                entry = json.loads(line)
                answer, code = entry["answer"], entry["code"]
                if not self._signer.made(code, self._text(len(found), answer)) or not line.endswith("\n"):
                    raise ValueError("was not written by this user's runs, was changed since, or has no end")
            except (ValueError, LookupError, TypeError, RecursionError):
                # a kill leaves half a line at the end
                if line.endswith("\n"):
                    self._say(f"{self.path}: line {len(found) + 1} is not believed: going on from there")
                atomic_write_text(self.path, "".join(lines[: len(found)]))
                break
            found.append(answer)
        return found

    @staticmethod
    def _text(number: int, answer: Any) -> str:
        # the number too: the lines of a file cannot change places
        return f"{number}\n{json.dumps(answer, sort_keys=True)}"

    def add(self, number: int, answer: Any) -> None:
        """Saves one more.

        Args:
            number: of the answer, from 0.
            answer: as JSON has it; floats come back to the last bit.
        """
        if self._signer is None:
            return
        code = self._signer.code(self._text(number, answer))
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"answer": answer, "code": code}) + "\n")
        except OSError as error:
            self._signer = None
            self._say(f"{self.path}: cannot be written, going on unsaved: {error.strerror}")


class Answers:
    """The answers to a question's parts, one after the other: those that a journal has, then new ones.

    Attributes:
        saved: how many the journal had.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._known, self._next = journal, journal.load(), 0
        self.saved = len(self._known)

    def next(self, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The answer to the next part, by `find` where it is not known."""
        number = self._next
        self._next += 1
        if number < self.saved:
            return self._known[number]
        answer = find()
        self._journal.add(number, answer)
        return answer
