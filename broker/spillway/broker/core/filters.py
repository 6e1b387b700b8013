"""Filters of routes: expressions in CEL over `headers`, `tenant`, `key` and `id`. Pure.

A filter runs on the broker's only thread, on every message of its route, and some of what it reads comes from tenants.
So what an evaluation costs is bounded when the filter is made: an expression is looked through before it is compiled, and
refused if it nests too deep, works through lists too often, or has a regular expression that is large or not written out.
(Regular expressions are those of Rust's regex: their time is linear in the text, but they are compiled for every message.)
Only the headers that a filter names are handed to it; one that looks at all of them takes messages with few headers only.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from spillway.broker.core.expressions import compile_expression

FILTER_BYTES_MAX = 4096
DEPTH_MAX = 32  # brackets within brackets; the evaluator recurses
CHAIN_MAX = 32  # operators in a row that nest likewise
CONCATENATIONS_MAX = 16  # each copies what is left of it
MACROS_MAX = 4  # all, exists, exists_one; not within one another
STEPS_MAX = 20_000  # elements that macros work through, each times the tokens that are evaluated for it
HEADERS_MAX = 256  # of a message, if a filter looks at all of them
SCAN_BYTES_MAX = 16 << 10  # of the headers' values, if a filter searches them with macros or regular expressions
REGEX_COST_MAX = 1000  # of all regular expressions of a filter; see _regex_cost
ERROR_CHARS_MAX = 300
VARIABLES = ("headers", "tenant", "key", "id")
MACROS = frozenset(("all", "exists", "exists_one", "existsOne"))
METHODS = MACROS | frozenset((
    "size", "contains", "startsWith", "endsWith", "matches", "getFullYear", "getMonth", "getDate", "getDayOfMonth",
    "getDayOfWeek", "getDayOfYear", "getHours", "getMinutes", "getSeconds", "getMilliseconds"))
FUNCTIONS = frozenset(("has", "size", "int", "uint", "double", "string", "bytes", "timestamp", "duration"))

_TOKEN = re.compile(r"""
    (?P<space>[\ \t\r\n\f]+|//[^\n]*)
  | (?P<string>[bB]?(?:
      [rR](?:\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|"[^"\r\n]*"|'[^'\r\n]*')
    | \"{3}(?:\\[\s\S]|[^\\])*?\"{3}|'{3}(?:\\[\s\S]|[^\\])*?'{3}|"(?:\\.|[^"\\\r\n])*"|'(?:\\.|[^'\\\r\n])*'))
  | (?P<number>0[xX][0-9a-fA-F]+[uU]?|[0-9]*\.[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+(?:[eE][+-]?[0-9]+)?[uU]?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
  | (?P<operator>&&|\|\||[=!<>]=|[<>+\-*/%!?:.,()\[\]{}])
""", re.VERBOSE)
_LITERAL = re.compile(r"""(?P<prefix>[bBrR]*)(?P<quote>\"{3}|'{3}|"|')(?P<body>[\s\S]*)(?P=quote)""")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_CHAINING = frozenset(("+", "-", "*", "/", "%", "==", "!=", "<", "<=", ">", ">=", "in", ".", "[", "("))
_CUTTING = frozenset((",", "&&", "||", "?", ":"))
_PARSER_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (.*)")
_NO_OVERLOAD = re.compile(r"Undefined variable or function: '(\w+)'")  # every name was checked: the arguments are wrong
_OWN_SIGNALS = (KeyboardInterrupt, SystemExit, MemoryError)


class FilterError(Exception):
    """A filter that does not compile, or that fails on a message."""


class _Token(NamedTuple):
    kind: str  # group of _TOKEN; "end"
    text: str
    at: int


class _Macro(NamedTuple):
    start: int  # first token of the range
    open: int  # of its bracket
    end: int  # of the bracket that closes it
    variable: str


class Filter:
    """A compiled filter."""

    def __init__(self, text: str) -> None:
        """Raises FilterError."""
        found = _Checker(text)
        self.text = text
        self._names = found.headers  # None: all
        self._scans = found.scans
        program = _compile(text)
        for literal in found.patterns:  # an invalid one would fail on every message
            _run(_compile(f'"".matches({literal})'), {})
        self._program = program
        try:
            result = _run(program, {"headers": {}, "tenant": "", "key": "", "id": ""})
        except FilterError as error:
            # Variables have one type each, so what does not fit now never does.
            if found_call := _NO_OVERLOAD.match(str(error)):
                raise FilterError(f"{found_call[1]} does not take what it is called with") from None
            if isinstance(error.__cause__, TypeError):
                raise
            return  # it needs a header, or another value
        if result is not True and result is not False:
            raise FilterError(f"gives {_kind(result)}, not a bool")

    def matches(self, headers: Mapping[str, str], tenant: str, key: str, id: str) -> bool:
        """Whether a message passes. Raises FilterError if the filter fails on it: a header that it needs is missing, a
        conversion fails, or there are more headers than it may look at."""
        names = self._names
        if names is None:
            if len(headers) > HEADERS_MAX:
                raise FilterError(f"the message has {len(headers)} headers; a filter that looks at all takes {HEADERS_MAX}")
            seen = headers if type(headers) is dict else dict(headers)
        else:
            seen = {name: headers[name] for name in names if name in headers}
        if self._scans and sum(map(len, seen.values())) > SCAN_BYTES_MAX:
            raise FilterError(f"the headers have more than {SCAN_BYTES_MAX} characters, the most that this filter searches")
        result = _run(self._program, {"headers": seen, "tenant": tenant, "key": key, "id": id})
        if result is True or result is False:
            return result
        raise FilterError(f"gives {_kind(result)}, not a bool")

    def __repr__(self) -> str:
        return f"<Filter {self.text!r}>"


@lru_cache(4096)
def compile_filter(text: str) -> Filter:
    """Compiles a filter. Raises FilterError saying what is wrong with it, and where."""
    return Filter(text)


class _Checker:
    """Looks through an expression. `headers`: the names that it reads, None if it may read any; `scans`: whether it
    searches their values at length; `patterns`: its regular expressions, as literals. Raises FilterError."""

    def __init__(self, text: str) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > FILTER_BYTES_MAX:
            raise FilterError(f"has {size} bytes; at most {FILTER_BYTES_MAX}")
        self.text = text
        self.tokens = self._lex()
        self.partner = self._brackets()
        self.patterns: list[str] = []
        self.macros = [m for i in range(len(self.tokens)) if (m := self._macro(i)) is not None]
        self._check_macros()
        names: set[str] = set()
        self.headers: set[str] | None = names
        for i, token in enumerate(self.tokens):
            if token.kind != "name":
                continue
            self._check_name(i)
            if token.text == "headers" and self._text(i - 1) != "." and self.headers is not None:
                name = self._header(i)
                if name is None:
                    self.headers = None
                else:
                    names.add(name)
        cost = sum(_regex_cost(p) for p in self.patterns)
        if cost > REGEX_COST_MAX:
            raise FilterError(f"its regular expressions are too costly ({cost}; at most {REGEX_COST_MAX}): every message "
                              "pays for compiling them; use fewer classes like \\w and smaller repetitions")
        self.scans = bool(self.macros or self.patterns)

    def _fail(self, token: _Token, what: str) -> NoReturn:
        before = self.text[:token.at]
        raise FilterError(f"line {before.count(chr(10)) + 1}, column {token.at - before.rfind(chr(10))}: {what}")

    def _text(self, i: int) -> str:
        """A token, "" before the first and behind the last; strings as they are written."""
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    def _is(self, i: int, kind: str) -> bool:
        return 0 <= i < len(self.tokens) and self.tokens[i].kind == kind

    def _lex(self) -> list[_Token]:
        tokens = []
        at = 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                self._fail(_Token("", "", at), f"unexpected {self.text[at]!r}")
            kind = match.lastgroup or ""
            if kind != "space":
                tokens.append(_Token(kind, match.group(), at))
            at = match.end()
        if not tokens:
            raise FilterError("is empty")
        return tokens

    def _brackets(self) -> dict[int, int]:
        """Which bracket closes which. Bounds how deep the parsed expression can be."""
        partner: dict[int, int] = {}
        stack: list[int] = []
        chains = [0]
        concatenations = 0
        for i, token in enumerate(self.tokens):
            text = token.text if token.kind in ("operator", "name") else ""
            if text in _CHAINING:
                chains[-1] += 1
                if chains[-1] > CHAIN_MAX:
                    self._fail(token, f"more than {CHAIN_MAX} operators in a row; use a list and `in`, or brackets and &&")
            elif text in _CUTTING:
                chains[-1] = 0
            if text == "+":
                concatenations += 1
                if concatenations > CONCATENATIONS_MAX:
                    self._fail(token, f"more than {CONCATENATIONS_MAX} additions")
            if text in _CLOSING:
                stack.append(i)
                chains.append(0)
                if len(stack) > DEPTH_MAX:
                    self._fail(token, f"more than {DEPTH_MAX} brackets within one another")
            elif text in (")", "]", "}"):
                if not stack or _CLOSING[self.tokens[stack[-1]].text] != text:
                    self._fail(token, f"{text!r} closes nothing")
                partner[i] = stack.pop()
                partner[partner[i]] = i
                chains.pop()
        if stack:
            self._fail(self.tokens[stack[-1]], f"{self.tokens[stack[-1]].text!r} is not closed")
        return partner

    def _called(self, i: int) -> bool:
        """Whether a token is the name of a function or method that is called."""
        return self._is(i, "name") and self._text(i + 1) == "(" and self._is(i + 1, "operator")

    def _macro(self, i: int) -> _Macro | None:
        """The macro whose name is a token."""
        token = self.tokens[i]
        if not (self._called(i) and token.text in MACROS and self._text(i - 1) == "."):
            return None
        if not (self._is(i + 2, "name") and self._text(i + 3) == ","):
            self._fail(token, f"{token.text} takes a variable and a condition on it")
        variable = self._text(i + 2)
        if variable in VARIABLES or variable in ("true", "false", "null", "in"):
            self._fail(self.tokens[i + 2], f"{variable!r} has a meaning already")
        start = i - 2
        if self._text(start) == "]" and self._is(start, "operator"):
            start = self.partner[start]
            before = self.tokens[start - 1] if start else None
            if before is not None and (before.kind != "operator" or before.text in (")", "]", "}", ".")) and before.text != "in":
                start = -1
        elif self._text(start) != "headers" or self._text(start - 1) == ".":
            start = -1
        if start < 0:
            self._fail(token, f"{token.text} works through headers or a list that is written out only")
        return _Macro(start, i + 1, self.partner[i + 1], variable)

    def _check_macros(self) -> None:
        if len(self.macros) > MACROS_MAX:
            raise FilterError(f"has {len(self.macros)} of {', '.join(sorted(MACROS))}; at most {MACROS_MAX}")
        steps = 0
        for macro in self.macros:
            if any(other.start < macro.start and macro.end <= other.end for other in self.macros):
                self._fail(self.tokens[macro.open - 1], "all, exists and exists_one may not stand within one another")
            elements = HEADERS_MAX
            if self._text(macro.start) == "[":
                elements = 1 + sum(self._text(i) == "," for i in range(macro.start, macro.open))
            steps += elements * (macro.end - macro.open)
        if steps > STEPS_MAX:
            raise FilterError(f"its macros may take {steps} steps; at most {STEPS_MAX}: use shorter lists and conditions")

    def _check_name(self, i: int) -> None:
        token = self.tokens[i]
        name = token.text
        member = self._text(i - 1) == "." and self._is(i - 1, "operator")
        if member and not (self._is(i - 2, "name") or self._is(i - 2, "string") or self._is(i - 2, "number")
                           or self._text(i - 2) in (")", "]", "}")):
            self._fail(token, "unexpected '.'")
        if self._text(i + 1) == "{" and self._is(i + 1, "operator"):
            self._fail(token, "messages cannot be made here")
        if self._called(i):
            if name == "in":
                return
            known = METHODS if member else FUNCTIONS
            if name not in known:
                self._fail(token, f"there is no {'method' if member else 'function'} {name}; there are {', '.join(sorted(known))}")
            if name == "matches":
                self._pattern(i)
        elif not member and name not in VARIABLES and name not in ("true", "false", "null", "in") and not any(
                m.variable == name and m.open < i < m.end for m in self.macros):
            self._fail(token, f"there is no variable {name}; there are {', '.join(VARIABLES)}")

    def _pattern(self, i: int) -> None:
        """A call of matches: its argument must be one string, so that its cost can be told."""
        if self.partner[i + 1] != i + 3 or not self._is(i + 2, "string"):
            self._fail(self.tokens[i], "matches takes one string that is written out")
        if any(m.open < i < m.end for m in self.macros):
            self._fail(self.tokens[i], "matches may not stand within all, exists or exists_one")
        self.patterns.append(self._text(i + 2))

    def _header(self, i: int) -> str | None:
        """The one name that `headers` at a token is asked for; None if that cannot be told."""
        after = self._text(i + 1)
        if after == "." and self._is(i + 2, "name") and not self._called(i + 2):
            return self._text(i + 2)
        if after == "[" and self._is(i + 2, "string") and self.partner[i + 1] == i + 3:
            return _plain(self._text(i + 2))
        if (self._text(i - 1) == "in" and self._is(i - 2, "string")
                and self._text(i - 3) in ("", "(", "&&", "||", "?", ":") and after != "["):
            return _plain(self._text(i - 2))
        return None


def _plain(literal: str) -> str | None:
    """What a literal stands for, if that is what is written in it."""
    match = _LITERAL.fullmatch(literal)
    if match is None or match["prefix"].lower() not in ("", "r") or ("\\" in match["body"] and not match["prefix"]):
        return None
    return match["body"]


_ATOM = re.compile(r"""
    (?P<wide>\\(?:[wW]|[pP](?:\{[^}]*\}|[A-Za-z])))
  | (?P<narrow>\\(?:[dDsSB]|b(?:\{[a-z-]+\})?))
  | \\(?:[xuU](?:\{[0-9A-Fa-f]*\}|[0-9A-Fa-f]{2,8})|[\s\S])
  | (?P<group>\((?:\?(?:P?<[A-Za-z_][A-Za-z0-9_.]*>|(?P<flags>[a-zA-Z-]*)(?P<end>[:)])))?)
  | (?P<set>\[\^?\]?)
  | (?P<close>[)\]])
  | \{\ *(?P<least>[0-9]{0,9})\ *(?P<range>,\ *(?P<most>[0-9]{0,9})\ *)?\}
  | (?P<repeat>[*+?])
  | (?P<brace>[{}])
  | (?P<dot>\.)
  | [\s\S]
""", re.VERBOSE)


def _regex_cost(literal: str) -> int:
    """About how large a regular expression becomes when it is compiled: characters count 1, sets 10, classes up to 300 for
    what Unicode has of them, and repetitions as often as they repeat. Raises FilterError for what it does not understand."""
    match = _LITERAL.fullmatch(literal)
    if match is None or match["prefix"].lower() not in ("", "r"):
        raise FilterError(f"{literal[:64]} is not a regular expression")
    pattern = match["body"]
    if not match["prefix"]:
        if re.search(r"""\\[^\\'"]""", pattern.replace("\\\\", "")):
            raise FilterError(f"a regular expression with escapes is written as r'…': {literal[:64]}")
        pattern = re.sub(r"\\([\s\S])", r"\1", pattern)
    costs = [0]  # of the groups and sets that are open
    sets = 0  # of these, sets
    last = 0  # cost of the last atom: what a repetition repeats
    factor = 1
    for atom in _ATOM.finditer(pattern):
        kind = atom.lastgroup if atom.lastgroup not in ("flags", "end", "range", "most") else (
            "group" if atom["group"] else "least")
        if kind == "set" or (kind == "group" and not sets and atom["end"] != ")"):
            costs.append(10 if kind == "set" else 1)
            sets += kind == "set"
            last = 1
        elif kind == "close" and len(costs) > 1 and (atom.group() == "]") == bool(sets):
            last = costs.pop()
            costs[-1] += last
            sets -= sets > 0
        elif kind == "least" and not sets:
            times = max(int(atom["least"] or 0), int(atom["most"] or 0)) + (1 if atom["range"] and not atom["most"] else 0)
            costs[-1] += last * max(0, times - 1)
            last *= max(1, times)
        elif kind == "repeat" and not sets:
            costs[-1] += 1
        elif kind == "brace" and not sets:
            raise FilterError(f"a brace in a regular expression that repeats nothing is written as [{atom['brace']}]")
        else:
            last = {"wide": 300, "narrow": 50, "dot": 10}.get(kind or "", len(atom.group()))
            costs[-1] += last
        if kind == "group" and not sets and atom["flags"]:
            if not re.fullmatch(r"[ism]*(-[ism]*)?", atom["flags"]):
                raise FilterError(f"the flags {atom['flags']!r} are not there in regular expressions; i, s and m are")
            if "i" in atom["flags"]:
                factor = 2
    return sum(costs) * factor


def _compile(text: str) -> Any:
    try:
        return compile_expression(text)
    except _OWN_SIGNALS:
        raise
    except BaseException as error:  # a panic of the parser is no Exception
        said = str(error).removeprefix(f"Failed to parse expression '{text}': ")
        if found := _PARSER_ERROR.search(said):
            said = f"line {found[1]}, column {found[2]}: {found[3]}"
        raise FilterError(_short(said)) from None


def _run(program: Any, variables: dict[str, Any]) -> Any:
    try:
        return program.execute(variables)
    except _OWN_SIGNALS:
        raise
    except KeyError as error:
        raise FilterError(_short(f"there is no {error}")) from error
    except BaseException as error:  # a panic of the evaluator is no Exception
        raise FilterError(_short(str(error) or type(error).__name__)) from error


def _short(message: str) -> str:
    return message if len(message) <= ERROR_CHARS_MAX else message[:ERROR_CHARS_MAX] + "…"


def _kind(result: object) -> str:
    """What CEL calls a value."""
    names = {"str": "a string", "dict": "a map", "NoneType": "null", "float": "a double"}
    kind = type(result).__name__
    return names.get(kind, f"a value of type {kind}")
