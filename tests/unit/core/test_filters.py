"""Filters of routes: what they choose, what is refused and where, and that nothing they are given costs much or escapes."""
from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from typing import Any

import cel  # the whole package, to compare with
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from spillway.broker.core import filters
from spillway.broker.core.filters import FILTER_BYTES_MAX, FilterError, compile_filter

HEADERS = {"kind": "order", "n": "3", "empty": ""}


def passes(text: str, headers: dict[str, str] | None = None, tenant: str = "acme", key: str = "user-1", id: str = "7") -> bool:
    """Whether a message passes a filter."""
    return compile_filter(text).matches(HEADERS if headers is None else headers, tenant, key, id)


@pytest.mark.parametrize("text", [
    "true",
    'headers["kind"] == "order"',
    "headers.kind == 'order' && tenant != \"other\"",
    "'kind' in headers && !('none' in headers)",
    "has(headers.kind) && !has(headers.none)",
    "key.startsWith('user-') && key.endsWith('1') && key.contains('er')",
    "tenant in ['acme', 'other'] || id == 'x'",
    "int(headers.n) > 2 && double(headers['n']) < 3.5 && size(tenant) == 4 && tenant.size() == 4",
    "key.matches('^user-[0-9]+$')",
    r"key.matches(r'^\w+-\d{1,4}$')",
    "key.matches('^user-\\\\d+$')",
    "headers.exists(k, headers[k] == 'order') && headers.all(k, k != 'z') && headers.exists_one(k, k == 'n')",
    "['us', 'x'].exists(prefix, key.startsWith(prefix))",
    "size(headers) == 3 && headers == headers",
    "(headers['none'] == 'x' || true) && ('none' in headers ? headers['none'] == 'x' : true)",
    "tenant == 'ac' + 'me' // a comment with 'quotes and (brackets\n && true",
    "timestamp('2024-05-01T10:00:00Z').getHours() == 10 && duration('1h') > duration('59m')",
    "r'\\' == '\\\\' && '''it's''' == \"it's\" && headers[r'kind'] == 'order' && headers['\\x6bind'] == 'order'",
    "'ki' + 'nd' in headers",
])
def test_what_passes(text: str) -> None:
    """By headers, tenant, key and id."""
    assert passes(text) is True
    assert passes(f"!({text}\n)") is False


@pytest.mark.parametrize(("text", "says"), [
    ("", "is empty"),
    (" // nothing", "is empty"),
    ("x" * 4097, "has 4097 bytes; at most 4096"),
    ("'" + "ü" * 2048 + "' == ''", "has 4104 bytes"),
    ("true &&", "line 1, column 8: Syntax error: mismatched input '<EOF>'"),
    ("true\n&& tenant =", "line 2, column 11: unexpected '='"),
    ("tenant == 'a", "line 1, column 11: unexpected"),
    ("tenant == \0", "line 1, column 11: unexpected '\\x00'"),
    ("tenant == `a`", "line 1, column 11: unexpected '`'"),
    ("tenänt == 'a'", "line 1, column 4: unexpected 'ä'"),
    ("(tenant == 'a'", "line 1, column 1: '(' is not closed"),
    ("tenant == 'a')", "line 1, column 14: ')' closes nothing"),
    ("[true)", "line 1, column 6: ')' closes nothing"),
    ("payload == 'x'", "line 1, column 1: there is no variable payload; there are headers, tenant, key, id"),
    ("tenant == 'x' || [1].exists(x, x == 1) && x == 1", "column 43: there is no variable x"),
    (".tenant == 'x'", "unexpected '.'"),
    ("now() > 1", "there is no function now; there are bytes, double"),
    ("tenant.lower() == 'x'", "line 1, column 8: there is no method lower; there are all, contains"),
    ("headers.map(k, k) == []", "there is no method map"),
    ("headers.filter(k, k == 'a') == []", "there is no method filter"),
    ("type(tenant) == string", "there is no function type"),
    ("startsWith(tenant, 'x')", "there is no function startsWith"),
    ("Struct{a: 1} == 1", "messages cannot be made here"),
    ("tenant.startsWith(1)", "startsWith does not take what it is called with"),
    ("tenant + 1 == 'x'", "Unsupported operation: string + int"),
    ("tenant", "gives a string, not a bool"), ("1", "gives a value of type int, not a bool"),
    ("1.5", "gives a double"), ("null", "gives null"), ("headers", "gives a map"), ("[tenant]", "gives a value of type list"),
    ("(" * 33 + "true" + ")" * 33, "column 33: more than 32 brackets within one another"),
    ("+".join(["'a'"] * 18) + "== ''", "more than 16 additions"),
    ("-".join(["1"] * 34) + " == 1", "more than 32 operators in a row"),
    ("headers" + ".a" * 33, "more than 32 operators in a row"),
    ("headers.exists(k, headers.exists(l, l == k))", "column 27: all, exists and exists_one may not stand within one another"),
    ("[[1].exists(x, x == 1)].exists(y, y)", "may not stand within one another"),
    ("&&".join(["['a'].exists(x, x == 'a')"] * 5), "has 5 of all, exists, existsOne, exists_one; at most 4"),
    ("headers.exists(k, " + "||".join([f"k == '{i}'" for i in range(30)]) + ")", "steps; at most 20000"),
    ("tenant.exists(c, c == 'x')", "exists works through headers or a list that is written out only"),
    ("headers.kind.exists(c, c == 'x')", "works through headers or a list"),
    ("(['a'] + ['b']).exists(c, c == 'x')", "works through headers or a list"),
    ("['a']['b'].exists(c, c == 'x')", "works through headers or a list"),
    ("headers.exists(true)", "exists takes a variable and a condition"),
    ("headers.exists(k, v, v == 'x')", "there is no variable v"),
    ("headers.exists(headers, true)", "'headers' has a meaning already"),
    ("tenant.matches(key)", "matches takes one string that is written out"),
    ("tenant.matches('a' + key)", "matches takes one string that is written out"),
    ("tenant.matches(('a'))", "matches takes one string that is written out"),
    ("headers.exists(k, k.matches('a'))", "matches may not stand within all, exists or exists_one"),
    ("tenant.matches('(')", "not a valid regex"),
    ("tenant.matches('(?=a)')", "not a valid regex"),
    (r"tenant.matches('\d')", "is written as r'…'"),
    (r"tenant.matches(r'\w{100}')", "too costly (30000; at most 1000)"),
    (r"tenant.matches(r'[\w.]{0,100}')", "too costly"),
    (r"tenant.matches(r'(?:(\d){5}){5}')", "too costly"),
    (r"tenant.matches(r'\pL+{9}')", "too costly"),
    ("||".join(["tenant.matches('a{400}')"] * 3), "too costly (1200"),
    ("tenant.matches('(?i)a{600}')", "too costly (1208"),
    ("tenant.matches('(?x)a # {')", "the flags 'x' are not there"),
    ("tenant.matches('a{b}')", "is written as [{]"),
    ("tenant.matches(b'a')", "is not a regular expression"),
    ("true '" + "x" * 600 + "'", "Syntax error"),
])
def test_what_is_refused(text: str, says: str) -> None:
    """With what is wrong and where, in few words."""
    with pytest.raises(FilterError) as caught:
        compile_filter(text)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("text", "headers", "says"), [
    ("headers['none'] == 'x'", {}, "there is no 'none'"),
    ("headers.none == 'x'", {}, "there is no 'none'"),
    ("int(headers.n) == 1", {"n": "x"}, "Function 'int' error"),
    ("1 / int(headers.n) == 1", {"n": "0"}, "division by zero"),
    ("int(headers.n) + 1 > 0", {"n": str((1 << 63) - 1)}, "overflow"),
    ("headers.n == 'x' ? 1 : true", {"n": "x"}, "gives a value of type int, not a bool"),
    ("timestamp(headers.n) == timestamp(headers.n)", {"n": "x"}, "Function 'timestamp' error"),
    ("size(headers) > 0", {str(i): "" for i in range(257)}, "has 257 headers; a filter that looks at all takes 256"),
    ("headers.exists(k, k == 'a')", {"a": "x" * 16385}, "more than 16384 characters"),
    ("headers.a.matches('x')", {"a": "x" * 16385}, "more than 16384 characters"),
])
def test_it_fails_on_a_message(text: str, headers: dict[str, str], says: str) -> None:
    """Of which it can make nothing."""
    with pytest.raises(FilterError) as caught:
        passes(text, headers)
    assert says in str(caught.value)


def test_headers_that_are_not_named_do_not_count() -> None:
    """A filter reads those that it names, of however many: a message's other headers cost it nothing."""
    many = {str(i): "x" * 100 for i in range(10_000)} | {"kind": "order"}
    filter = compile_filter("headers['kind'].matches('^or') && 'kind' in headers && has(headers.kind) && headers.kind != ''")
    assert filter.matches(many, "", "", "")
    started = time.process_time()
    for _ in range(200):
        filter.matches(many, "", "", "")
    assert time.process_time() - started < 1.0


def test_one_text_is_compiled_once() -> None:
    """Routes are looked at anew after every change of the directory."""
    assert compile_filter("tenant == 'once'") is compile_filter("tenant == 'once'")


class Panic(BaseException):
    """As pyo3's PanicException: not an Exception."""


@pytest.mark.parametrize("error", [Panic("a bug of the library"), ValueError("x" * 100_000), RuntimeError()])
def test_no_panic_of_the_library_escapes(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises fails this filter, not the node; only the process's own signals go on."""
    class Program:
        def execute(self, variables: dict[str, Any]) -> Any:
            raise error

    def compile_badly(text: str) -> Any:
        raise error

    good = compile_filter.__wrapped__("tenant == 'x'")
    monkeypatch.setattr(good, "_program", Program())
    with pytest.raises(FilterError) as caught:
        good.matches({}, "", "", "")
    assert len(str(caught.value)) < 400
    monkeypatch.setattr(filters, "compile_expression", compile_badly)
    with pytest.raises(FilterError):
        compile_filter.__wrapped__("tenant == 'x'")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit, MemoryError])
def test_signals_of_the_process_are_not_swallowed(signal: type[BaseException]) -> None:
    """They are no failure of a filter."""
    class Program:
        def execute(self, variables: dict[str, Any]) -> Any:
            raise signal

    filter = compile_filter.__wrapped__("tenant == 'x'")
    filter._program = Program()
    with pytest.raises(signal):
        filter.matches({}, "", "", "")


WORDS = ["headers", "tenant", "key", "id", "headers['a']", "headers.b", "'a'", '"b"', "r'\\'", "'''x'''", "b'c'", "true", "false",
         "null", "1", "2u", "1.5", "-1", "9223372036854775807", "(", ")", "[", "]", "{", "}", ",", ":", "?", ".", "&&", "||", "!",
         "==", "!=", "<", ">=", "+", "-", "*", "/", "%", " in ", "size(", ".size()", ".matches('a+')", ".contains(", ".startsWith(",
         "has(headers.a)", ".exists(k, ", ".all(x, ", "k", "x", "int(", "string(", "duration('1s')", "timestamp(", "//\n", "\\", "'",
         '"', "ü", "\0", "@", "foo", "foo("]


@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join) | st.text(max_size=40))
@example("true" + "?true:true" * 200)
@example("!" * 4000 + "true")
@example("- " * 2000 + "1 > 0")
def test_anything_compiles_or_is_refused(text: str) -> None:
    """Nothing but FilterError comes out, neither of compiling nor of matching."""
    try:
        filter = compile_filter.__wrapped__(text)
    except FilterError:
        return
    for headers in ({}, {"a": "1", "b": "x"}, {"a": "", "k": "ü"}):
        try:
            assert filter.matches(headers, "acme", "user", "7") in (True, False)
        except FilterError:
            pass


terms = st.one_of(
    st.sampled_from(["tenant", "key", "id", "headers.a", "headers['b']", "headers[\"a\"]", "headers['\\x61']", "'a'", "'b' + 'c'"]).flatmap(
        lambda left: st.sampled_from([f"{left} == '1'", f"{left}.contains('a')", f"{left} in headers", f"{left} in ['a', 'b']",
                                      f"({left}) in headers", f"headers[{left}] == 'x'", f"'b' in headers == ({left} in headers)"])),
    st.sampled_from(["has(headers.a)", "headers.exists(k, k == 'a')", "headers.all(k, headers[k] != 'x')", "size(headers) == 1",
                     "'a' in headers", "!('b' in headers)", "headers == {'a': '1'}", "['a', 'b'].exists(k, k in headers)"]))
texts = st.recursive(terms, lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["&&", "||", "=="]), inner)
                     | st.builds("({} ? {} : {})".format, inner, inner, inner), max_leaves=6)


@given(texts, st.dictionaries(st.sampled_from(["a", "b", "bc", "z", "1"]), st.sampled_from(["1", "x", "a"])),
       st.sampled_from(["a", "b", "1"]))
def test_it_decides_as_if_it_had_all_headers(text: str, headers: dict[str, str], tenant: str) -> None:
    """Leaving out those that are not named changes no outcome."""
    variables = {"headers": headers, "tenant": tenant, "key": "1", "id": "z"}
    try:
        expected = cel.compile(text).execute(variables)
    except Exception:
        expected = None
    try:
        found = compile_filter(text).matches(headers, tenant, "1", "z")
    except FilterError:
        found = None
    assert found is expected


@pytest.mark.parametrize("text", [
    "headers.exists(k, " + "||".join(["k.contains(headers[k])"] * 7) + ")",
    "[" + ",".join(["'aaaaaaaab'"] * 170) + "].exists(s, " + " || ".join(["headers['big'].contains(s)"] * 11) + ")",
    " || ".join(["headers['big'].contains('aaaaaaaaaaab')"] * 95),
    "+".join(["headers['big']"] * 16) + " == ''",
    "headers['big'].matches('(a|b)*a(a|b){12}x|([ab]*a[ab]{60})x')",
    r"headers['big'].matches(r'\w+x\pL+y')",
    "||".join(["headers == headers"] * 200),
    "&&".join(["size(headers) > 0"] * 200),
])
def test_the_dearest_filters_end_soon(text: str) -> None:
    """Of what is taken, nothing holds up the broker: tens of milliseconds on the largest messages, not seconds."""
    assert len(text) <= FILTER_BYTES_MAX
    filter = compile_filter(text)
    for headers in ({f"{i:03}": "ab" * 30 for i in range(255)} | {"big": "ab" * 300}, {"big": "a" * 16_384},
                    {"big": "a" * 65_000}):
        started = time.process_time()
        try:
            filter.matches(headers, "t" * 255, "k" * 255, "i" * 255)
        except FilterError:
            pass
        assert time.process_time() - started < 0.5


def test_the_deepest_filters_need_little_stack() -> None:
    """A stack that overflows would end the process: an eighth of the usual one is enough for whatever is taken."""
    code = """
        import resource, threading
        from spillway.broker.core.filters import FilterError, compile_filter
        head = "(" * 31 + "1"
        texts = ["(" * 32 + "true" + ")" * 32, head + ("-1" * 31 + ")") * 31 + " > 0", "!" * 4000 + "true", "- " * 2000 + "1 > 0",
                 "headers.a" + "[0]" * 30 + " == 1", "[" * 31 + "]" * 31 + " == []", "true?true:" * 30 + "true",
                 "&&".join(["true"] * 600), "||".join(["false"] * 500), "1" + "-1" * 31 + " > 0",
                 "(" + "||(".join(["tenant == 'x'"] * 31) + ")" * 31]
        def run():
            for text in texts:
                try:
                    filter = compile_filter(text)
                    filter.matches({"a": "b"}, "", "", "")
                    print("taken")
                except FilterError as error:
                    print(error)
        threading.stack_size(1 << 20)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 11 and done.stdout.count("taken") >= 6, done.stdout
