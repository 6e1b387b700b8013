"""Writes what follows from the definitions of metrics: the tables of docs/observability.md, and Grafana's dashboards.
`--check` only tells what is not as it should be."""
from __future__ import annotations

import sys
from pathlib import Path

import dashboards
from spillway.broker.telemetry import registry
from spillway.client.dispatcher import metrics
from spillway.contract.telemetry.metrics import table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/observability.md"
BOARDS_AT = ROOT / "helm/spillway/dashboards"
END = "<!-- end -->"


def filled(text: str, what: str, rows: str) -> str:
    """The page with a table between its marks."""
    begin = f"<!-- {what}: scripts/observability.py -->\n"
    head, found, rest = text.partition(begin)
    assert found, f"{PAGE} has no {begin!r}"
    return f"{head}{begin}{rows}\n{END}{rest.partition(END)[2]}"


def wanted() -> dict[Path, str]:
    """Path -> what it should be."""
    text = PAGE.read_text()
    text = filled(text, "metrics of a node", table(registry.ALL))
    text = filled(text, "metrics of a dispatcher", table(metrics.ALL))
    return {PAGE: text, **{BOARDS_AT / f"{name}.json": dashboards.rendered(name) for name in dashboards.BOARDS}}


def main(argv: list[str]) -> int:
    """Returns 1 if something is not as it should be and was only to be checked."""
    wrong = [path for path, text in wanted().items() if not path.exists() or path.read_text() != text]
    for path in wrong:
        print(f"{path.relative_to(ROOT)} is not what the definitions give: run scripts/observability.py")
    if "--check" in argv:
        return bool(wrong)
    for path, text in wanted().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
