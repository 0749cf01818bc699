# SPDX-License-Identifier: GPL-2.0-only
"""Debian packages of any suite, from the mirror that this machine's own apt uses.

Nothing is installed and nothing of the machine's apt is changed: each suite gets lists and caches of
its own in the lab's cache directory.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvirt.errors import KvirtError
from kvirt.lab import host
from kvirt.lab.cache import cache_dir
from kvirt.lab.progress import Report, step

SOURCES = Path("/etc/apt")
# Names under which Debian's own archive has its main suites. Entries for other suites (security,
# updates, other vendors) say nothing about where these are.
MAIN_SUITES = {
    *("stable", "oldstable", "oldoldstable", "testing", "unstable", "sid"),
    *("bullseye", "bookworm", "trixie", "forky", "duke"),
}
ONE_LINE = re.compile(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)(?P<rest>.*)")
# One-line options and the deb822 fields of the same meaning; unlisted ones differ by case only.
FIELDS = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}


@dataclass(frozen=True)
class Source:
    """One entry of sources.list: where from, which suites, and the options to keep."""

    uris: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def deb822(self) -> str:
        """Return the entry in the form that both apt and mmdebstrap read."""
        fields = [
            ("Types", "deb"),
            ("URIs", self.uris),
            ("Suites", " ".join(self.suites)),
            ("Components", " ".join(self.components)),
            *self.options,
        ]
        return "".join(f"{name}: {value}\n" for name, value in fields)


def parse_deb822(text: str) -> list[Source]:
    """Parse a ``.sources`` file; disabled and source-only entries are left out."""
    sources = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            if line[0].isspace():
                # A continuation: the lines of a key that stands in the file itself.
                fields[name] = fields.get(name, "") + "\n" + line
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.pop("types", "").split():
            continue
        if fields.pop("enabled", "yes").lower() in ("no", "false", "off", "0"):
            continue
        uris = " ".join(fields.pop("uris", "").split())
        suites = tuple(fields.pop("suites", "").split())
        components = tuple(fields.pop("components", "").split())
        options = tuple((key.title(), value) for key, value in fields.items())
        sources.append(Source(uris, suites, components, options))
    return sources


def parse_one_line(text: str) -> list[Source]:
    """Parse a ``.list`` file; comments and deb-src lines are left out."""
    sources = []
    for line in text.splitlines():
        match = ONE_LINE.match(line.partition("#")[0].strip())
        if match is None:
            continue
        options = []
        for option in shlex.split(match["options"] or ""):
            name, _, value = option.partition("=")
            options.append((FIELDS.get(name, name.title()), value.replace(",", " ")))
        components = tuple(match["rest"].split())
        sources.append(Source(match["uri"], (match["suite"],), components, tuple(options)))
    return sources


def machine_source(directory: Path = SOURCES) -> Source:
    """Return the entry by which this machine gets Debian's own packages."""
    files = [directory / "sources.list"]
    files += sorted((directory / "sources.list.d").glob("*.list"))
    files += sorted((directory / "sources.list.d").glob("*.sources"))
    for path in files:
        if path.is_file():
            parse = parse_deb822 if path.suffix == ".sources" else parse_one_line
            for source in parse(path.read_text(errors="replace")):
                if MAIN_SUITES.intersection(source.suites) and "main" in source.components:
                    return source
    raise KvirtError(
        f"No entry in {directory} names a Debian suite such as trixie with the component main: "
        "add a Debian mirror to this machine's apt sources, kvirt takes kernels from there."
    )


def suite_source(suite: str) -> Source:
    """Return the machine's Debian entry, turned to one suite's main component."""
    source = machine_source()
    # Options that narrow what is fetched belong to the machine's entry, not to this suite.
    keep = [
        (name, value)
        for name, value in source.options
        if name.lower() not in ("targets", "languages", "architectures")
    ]
    return replace(source, suites=(suite,), components=("main",), options=tuple(keep))


class Suite:
    """One Debian suite: its package names, and downloads from it."""

    def __init__(self, name: str, architecture: str = "amd64") -> None:
        self.name = name
        self._dir = cache_dir() / "apt" / (name if architecture == "amd64" else f"{name}-{architecture}")
        self._config = {
            "Dir::Etc::SourceList": str(self._dir / "mirror.sources"),
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::State::Lists": str(self._dir / "lists"),
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": str(self._dir / "cache"),
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            # An index that is past its date still has its signature, and old kernels do no harm here.
            "Acquire::Check-Valid-Until": "false",
        }

    def _options(self) -> list[str]:
        return [part for key, value in self._config.items() for part in ("-o", f"{key}={value}")]

    def update(self) -> None:
        """Fetch the list of packages."""
        for part in ("lists/partial", "cache/archives/partial"):
            (self._dir / part).mkdir(parents=True, exist_ok=True)
        Path(self._config["Dir::Etc::SourceList"]).write_text(suite_source(self.name).deb822())
        argv = [host.program("apt-get"), *self._options(), "-q", "--error-on=any", "update"]
        done = host.run(argv)
        if done.returncode != 0:
            raise KvirtError(
                f"apt could not fetch the package list of the Debian suite {self.name} "
                f"({_complaint(done.stderr)}): check this machine's mirror and network."
            )

    def names(self, prefix: str) -> list[str]:
        """Return the names of all packages that start with ``prefix``."""
        argv = [host.program("apt-cache"), *self._options(), "pkgnames", prefix]
        done = host.run(argv)
        return sorted(done.stdout.split())

    def need(self, package: str) -> None:
        """Make sure of a package that goes with a kernel of this suite.

        :raises KvirtError: if it is not there: suites keep the packages of their newest kernels only
        """
        if package not in self.names(package):
            raise KvirtError(
                f"Debian's {self.name} has no {package} (any more): fetch the newest kernel with "
                "`kvirt lab kernel --update VERSION`."
            )

    def version(self, package: str) -> str:
        """Return the newest version of a package."""
        argv = [host.program("apt-cache"), *self._options(), "show", "--no-all-versions", package]
        done = host.run(argv)
        match = re.search(r"^Version: (.+)$", done.stdout, re.MULTILINE)
        if match is None:
            raise KvirtError(f"apt knows no version of {package} in {self.name}: try again.")
        return match[1]

    def download(self, package: str, directory: Path, report: Report, what: str) -> Path:
        """Download a package into ``directory`` and return its file.

        :param what: it is for, in a word
        """
        with step(report, f"Downloading {package}", f"{what}: downloading") as detail:
            return self._download(package, directory, detail)

    def _download(self, package: str, directory: Path, detail: Callable[[str], None]) -> Path:
        argv = [host.program("apt-get"), *self._options(), "-q", "-o", "APT::Status-Fd=1"]
        # apt downloads into its working directory, under a name of its own choice.
        into = directory / package
        into.mkdir(parents=True, exist_ok=True)
        child = host.start(
            ["env", f"--chdir={into}", *argv, "download", package],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                status = re.match(rb"dlstatus:\d+:([\d.]+):", line)
                if status is not None:
                    detail(f"{float(status[1]):.0f} %")
            complaint = child.stderr.read().decode(errors="replace")
            child.wait()
        finally:
            host.end(child)
        found = list(into.glob("*.deb"))
        if child.returncode != 0 or len(found) != 1:
            raise KvirtError(
                f"apt could not download {package} ({_complaint(complaint)}): "
                "check this machine's mirror and network, and try again."
            )
        return found[0]


def settings(names: Sequence[str] = ("Acquire",)) -> list[str]:
    """Return the machine's apt settings under ``names``, for a tool that starts without them."""
    done = host.run([host.program("apt-config"), "dump", "--no-empty", *names])
    # What describes index files is computed by apt, and may not be set from outside.
    return [line for line in done.stdout.splitlines() if "::IndexTargets::" not in line]


def _complaint(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith(("E:", "W:"))]
    return "; ".join(lines[:2]) or "it does not say why"


def unpack(package: Path, directory: Path) -> None:
    """Unpack the files of a downloaded package into ``directory``."""
    done = host.run([host.program("dpkg-deb"), "-x", package, directory])
    if done.returncode != 0:
        raise KvirtError(f"{package.name} cannot be unpacked ({done.stderr.strip()}): try again.")
