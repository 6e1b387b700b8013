"""Builds etcd and kube-apiserver from the Go module proxy, for test_apiserver.py: `python tests/helm/build_kube.py DIRECTORY`.
Needs Go, and half an hour of one core; nothing of it is part of the product."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

VERSION = "1.37.2"


def module(theirs: str) -> str:
    """A go.mod that has what Kubernetes' own has. The modules that live inside its repository are published as v0.x of the same release."""
    inside = re.findall(r"^\s*(k8s\.io/\S+) => \./staging", theirs, re.MULTILINE)
    published = "v0" + VERSION.removeprefix("1")
    required = {name: published if name in inside else version
                for name, version in re.findall(r"^\t(\S+) (v\S+)(?: // indirect)?$", theirs, re.MULTILINE)}
    go = re.search(r"^go .*$", theirs, re.MULTILINE)
    assert go is not None
    return "\n".join(["module kube", go[0], "require (", f"\tk8s.io/kubernetes v{VERSION}",
                      *(f"\t{name} {version}" for name, version in required.items()), ")", "replace (",
                      *(f"\t{name} => {name} {published}" for name in inside), ")", ""])


def main(directory: Path) -> None:
    """Leaves both programs in the directory, and Go's files in `build` beneath it."""
    work = directory / "build"
    work.mkdir(parents=True, exist_ok=True)

    def go(*arguments: str) -> str:
        return subprocess.run(["go", *arguments], cwd=work, check=True, env={**os.environ, "CGO_ENABLED": "0"},
                              stdout=subprocess.PIPE, text=True).stdout
    (work / "go.mod").write_text("module kube\n")
    found = re.search(r'"GoMod": "([^"]+)"', go("mod", "download", "-json", f"k8s.io/kubernetes@v{VERSION}"))
    assert found is not None
    (work / "go.mod").write_text(module(Path(found[1]).read_text()))
    stamp = "-s -w " + " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in (
        ("gitVersion", f"v{VERSION}"), ("gitMajor", VERSION.split(".")[0]), ("gitMinor", VERSION.split(".")[1])))
    go("build", "-mod=mod", "-ldflags", stamp, "-o", str(directory / "kube-apiserver"), "k8s.io/kubernetes/cmd/kube-apiserver")
    go("build", "-mod=mod", "-o", str(directory / "etcd"), "go.etcd.io/etcd/server/v3")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
