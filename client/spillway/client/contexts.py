"""Contexts: names for how to reach a cluster, in a file of the user's.

The file is `contexts.json` in `$XDG_CONFIG_HOME/spillway` (`~/.config/spillway`), for nobody else to read: it may hold tokens.
Every change replaces it as a whole.
"""
from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
KEYS = ("description", "address", "tls_ca", "tls_cert", "tls_key", "tls_server_name", "token", "token_file")
FORMAT = 1


class ContextError(ValueError):
    """There is no such context, or the file of contexts cannot be read or written."""


def default_path(environment: Mapping[str, str]) -> Path:
    """Where this user's contexts are."""
    home = environment.get("XDG_CONFIG_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".config"  # relative ones are to be ignored, says the standard
    return base / "spillway" / "contexts.json"


class Contexts:
    """The contexts of a file, which is read when something is asked for first, and need not exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, Any] | None = None

    @property
    def all(self) -> dict[str, dict[str, Any]]:
        """Name -> what it says; keys of KEYS."""
        found: dict[str, dict[str, Any]] = self._data()["contexts"]
        return found

    @property
    def selected(self) -> str:
        """The selected context's name; "": none is."""
        return str(self._data()["selected"])

    @property
    def previous(self) -> str:
        """The one that was selected before; ""; none was."""
        return str(self._data()["previous"])

    def current(self) -> dict[str, Any] | None:
        """The selected context."""
        return self.get(self.selected) if self.selected else None

    def get(self, name: str) -> dict[str, Any]:
        """One context; "-" is the previous one. Raises ContextError."""
        name = self.named(name)
        if name not in self.all:
            known = ", ".join(sorted(self.all)) or "none"
            raise ContextError(f"there is no context {name!r} in {self.path}; known are: {known}")
        return self.all[name]

    def named(self, name: str) -> str:
        """A name that the user gave; "-" is the previous one. Raises ContextError."""
        if name != "-":
            return name
        if not self.previous:
            raise ContextError("no context was selected before the present one")
        return self.previous

    def add(self, name: str, values: Mapping[str, Any], replace: bool = False) -> None:
        """Adds a context. Raises ContextError."""
        if not NAME.fullmatch(name):
            raise ContextError(f"{name!r} is not a name for a context: letters, digits and . _ -, at most 63, not - first")
        if name in self.all and not replace:
            raise ContextError(f"there is a context {name!r} already; --replace replaces it")
        self.all[name] = {key: values[key] for key in KEYS if values.get(key)}
        self._write()

    def select(self, name: str) -> str:
        """Selects a context, or none ("") ; "-" is the previous one. Returns its name. Raises ContextError."""
        name = self.named(name)
        if name:
            self.get(name)
        if name != self.selected:
            self._data().update(selected=name, previous=self.selected or self.previous)
            self._write()
        return name

    def remove(self, name: str) -> None:
        """Removes a context; if it was the selected one, none is selected. Raises ContextError."""
        self.get(name)
        found = self._data()
        del self.all[name]
        for role in ("selected", "previous"):
            if found[role] == name:
                found[role] = ""
        self._write()

    def readable_by_others(self) -> bool:
        """Whether other users of the machine may read the file."""
        try:
            return bool(stat.S_IMODE(self.path.stat().st_mode) & 0o077)
        except OSError:
            return False

    def _data(self) -> dict[str, Any]:
        if self._read is None:
            self._read = self._parsed()
        return self._read

    def _parsed(self) -> dict[str, Any]:
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return {"format": FORMAT, "selected": "", "previous": "", "contexts": {}}
        except OSError as error:
            raise ContextError(f"{self.path} cannot be read: {error.strerror}") from None
        try:
            return _checked(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ContextError(f"{self.path} is no file of contexts: {error}; repair or remove it") from None

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # mkstemp makes it readable for its owner only, from the first byte on.
            number, temporary = tempfile.mkstemp(prefix=".contexts-", dir=self.path.parent)
            try:
                with os.fdopen(number, "w") as file:
                    json.dump(self._data(), file, indent=2)
                    file.write("\n")
                Path(temporary).replace(self.path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ContextError(f"{self.path} cannot be written: {error.strerror}") from None


def _checked(found: Any) -> dict[str, Any]:
    """What a file says, if it is one of contexts. Raises ValueError."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    contexts = found.get("contexts")
    if not isinstance(contexts, dict):
        raise ValueError("it has no contexts")
    for name, one in contexts.items():
        if not isinstance(one, dict):
            raise ValueError(f"context {name!r} is not an object")
        for key, value in one.items():
            if key not in KEYS:
                raise ValueError(f"context {name!r} has an unknown key {key!r}")
            texts = value if key == "address" and isinstance(value, list) else [value]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{key} of context {name!r} is not text")
    return {"format": FORMAT, "selected": str(found.get("selected", "")), "previous": str(found.get("previous", "")), "contexts": contexts}
