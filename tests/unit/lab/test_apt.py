# SPDX-License-Identifier: GPL-2.0-only
"""The machine's own apt sources, in both forms, lead to any Debian suite."""

import pytest

from kvirt.errors import KvirtError
from kvirt.lab import apt

DEB822 = """\
# Comment before the fields
Types: deb deb-src
URIs: http://mirror.example/debian
  http://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
# Comment between the fields
Signed-By: /usr/share/keyrings/some.gpg
Check-Valid-Until: no

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
INLINE_KEY = """\
Types: deb
URIs: http://mirror.example/debian
Suites: trixie
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY
 -----END PGP PUBLIC KEY BLOCK-----
"""


def test_deb822_keeps_what_is_needed_to_trust_the_mirror():
    first, security = apt.parse_deb822(DEB822)
    assert first.uris == "http://mirror.example/debian http://second.example/debian"
    assert first.suites == ("bookworm", "bookworm-updates")
    assert first.components == ("main", "contrib")
    assert dict(first.options) == {
        "Signed-By": "/usr/share/keyrings/some.gpg",
        "Check-Valid-Until": "no",
    }
    assert security.suites == ("bookworm-security",)


def test_deb822_keeps_a_key_that_stands_in_the_file():
    (source,) = apt.parse_deb822(INLINE_KEY)
    assert apt.parse_deb822(source.deb822()) == [source]
    assert "\n -----BEGIN PGP" in source.deb822()


@pytest.mark.parametrize("change", ["Enabled: no\n", "Types: deb-src\n"])
def test_deb822_leaves_out_what_apt_does(change):
    assert apt.parse_deb822(INLINE_KEY + change) == []


def test_one_line_options_become_fields():
    text = """\
# deb http://commented.example/debian trixie main
deb-src http://mirror.example/debian trixie main
deb [ arch=amd64,i386 signed-by=/k.gpg trusted=yes ] http://mirror.example/debian trixie main contrib # why
deb http://plain.example/debian/ sid main
"""
    first, second = apt.parse_one_line(text)
    assert first.uris == "http://mirror.example/debian"
    assert first.components == ("main", "contrib")
    options = {"Architectures": "amd64 i386", "Signed-By": "/k.gpg", "Trusted": "yes"}
    assert dict(first.options) == options
    assert second == apt.Source("http://plain.example/debian/", ("sid",), ("main",))


def etc_apt(tmp_path, **files):
    (tmp_path / "sources.list.d").mkdir()
    for name, text in files.items():
        (tmp_path / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return tmp_path


def test_the_machine_source_is_debian_and_not_a_vendor(tmp_path):
    vendor = "deb [signed-by=/v.gpg] https://vendor.example/apt stable-vendor main\n"
    directory = etc_apt(tmp_path, a_list=vendor, debian_sources=DEB822)
    assert apt.machine_source(directory).uris.startswith("http://mirror.example/debian ")


def test_sources_list_comes_first(tmp_path):
    directory = etc_apt(tmp_path, debian_sources=DEB822)
    (directory / "sources.list").write_text("deb http://old.example/debian bookworm main\n")
    assert apt.machine_source(directory).uris == "http://old.example/debian"


def test_a_machine_without_debian_is_told_what_to_add(tmp_path):
    with pytest.raises(KvirtError, match="add a Debian mirror"):
        apt.machine_source(etc_apt(tmp_path))


def test_a_suite_is_fetched_whole_but_for_main_only(monkeypatch):
    (source,) = apt.parse_one_line(
        "deb [arch=arm64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib"
    )
    monkeypatch.setattr(apt, "machine_source", lambda: source)
    assert apt.suite_source("trixie-backports").deb822() == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie-backports\n"
        "Components: main\nSigned-By: /k.gpg\n"
    )


APT_GET = """\
#!/bin/sh
# Called with options and `download PACKAGE`, in the directory that is to have it.
echo dlstatus:1:12.5:Retrieving
eval package=\\${$#}
{EFFECT}
"""


@pytest.fixture
def apt_get(tmp_path, monkeypatch):
    """A suite, and an apt-get that does as a line of shell says."""
    monkeypatch.setenv("KVIRT_CACHE", str(tmp_path / "cache"))

    def make(effect):
        program = tmp_path / "apt-get"
        program.write_text(APT_GET.replace("{EFFECT}", effect))
        program.chmod(0o755)
        program_of = apt.host.program
        monkeypatch.setattr(
            apt.host, "program", lambda name: str(program) if name == "apt-get" else program_of(name)
        )
        return apt.Suite("trixie")

    return make


def test_a_download_is_announced_and_lands_where_it_is_wanted(apt_get, tmp_path):
    said = []
    made = apt_get("echo debian >$package'_1%3a2_all.deb'")
    file = made.download("busybox", tmp_path / "into", said.append, "initramfs")
    assert file == tmp_path / "into" / "busybox" / "busybox_1%3a2_all.deb"
    assert file.read_text() == "debian\n"
    assert said == ["Downloading busybox ..."]


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        ("echo 'E: Unable to locate package' >&2; exit 100", "busybox .E: Unable to locate package"),
        ("exit 0", "busybox .it does not say why"),
    ],
)
def test_a_download_that_fails_says_why(apt_get, tmp_path, effect, words):
    with pytest.raises(KvirtError, match=words):
        apt_get(effect).download("busybox", tmp_path, lambda text: None, "initramfs")
