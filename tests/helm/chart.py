"""The chart, rendered by Helm itself."""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

PATH = Path(__file__).resolve().parents[2] / "helm" / "spillway"
Values = dict[str, Any]
Object = dict[str, Any]


@cache
def chart() -> helm_python.Chart:
    """Loaded once."""
    return helm_python.Chart.load(PATH)


def complete(values: Values | None) -> Values:
    """Values of a test, which are without TLS and tokens unless they say otherwise."""
    return {"allowInsecure": True, **(values or {})}


def render(values: Values | None = None, name: str = "queue", namespace: str = "queues") -> list[Object]:
    """All objects that an installation with `complete` values makes. Raises helm_python.HelmError if the chart or its schema refuses the
    values."""
    chart().validate_schema(complete(values))
    rendered = chart().render(complete(values), name=name, namespace=namespace)
    return [document for path, text in sorted(rendered.items()) if path.endswith(".yaml")
            for document in yaml.safe_load_all(text) if document]


def find(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or of a kind and a name."""
    found = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def kinds(objects: list[Object]) -> list[str]:
    """The kinds of all objects, sorted."""
    return sorted(o["kind"] for o in objects)
