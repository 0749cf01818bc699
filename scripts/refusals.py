# SPDX-License-Identifier: GPL-2.0-only
"""Boots kernels that each lack something that `kvirt trace` needs, and prints what it says there.

All of Debian's kernels have it. These are small ones, built from Debian's source by Debian's compiler in a
directory of its own, and kept in the lab's cache. One lacks nothing, and shows that nothing else stops it.
"""

import hashlib
import json
import os
import re
import shutil
import sys

import click

from kvirt.errors import KvirtError
from kvirt.lab import apt, host
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.guest import Guest
from kvirt.lab.kernels import Kernel, get_kernel
from kvirt.lab.progress import TerminalReport, step
from kvirt.lab.root import get_root
from kvirt.lab.source import fetch_source, source_version

# What compiles a kernel.
PACKAGES = (
    *("bc", "bison", "cpio", "dwarves", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "xz-utils"),
)
# What a guest of the lab needs, and what tracing does; "make allnoconfig" leaves out all the rest.
OPTIONS = (
    *("64BIT", "SMP", "EXPERT", "CC_OPTIMIZE_FOR_SIZE", "UNWINDER_FRAME_POINTER", "PRINTK", "BUG"),
    *("MULTIUSER", "FUTEX", "EPOLL", "SIGNALFD", "TIMERFD", "EVENTFD", "AIO", "ADVISE_SYSCALLS"),
    *("MEMBARRIER", "RSEQ", "POSIX_TIMERS", "HIGH_RES_TIMERS", "NO_HZ_IDLE", "NAMESPACES", "PID_NS"),
    *("CGROUPS", "MEMCG", "MAGIC_SYSRQ", "BINFMT_ELF", "BINFMT_SCRIPT", "PCI", "PCI_MSI"),
    *("VIRTIO_MENU", "VIRTIO_PCI", "VIRTIO_CONSOLE", "TTY", "UNIX98_PTYS", "SERIAL_8250"),
    *("SERIAL_8250_CONSOLE", "DEVTMPFS", "FUSE_FS", "VIRTIO_FS", "FILE_LOCKING", "PROC_FS"),
    *("PROC_PAGE_MONITOR", "SYSCTL", "SYSFS", "SHMEM", "TMPFS", "DEBUG_FS", "KALLSYMS", "KALLSYMS_ALL"),
    *("PERF_EVENTS", "FTRACE", "KPROBES", "KPROBE_EVENTS", "BPF_SYSCALL", "BPF_JIT"),
    *("DEBUG_INFO_DWARF5", "DEBUG_INFO_BTF"),
)
# By the option that a kernel is built without: words of the sentence that has to be said there.
# Those that most of the kernel is built anew for stand last.
LACKING = {
    "KPROBE_EVENTS": "This kernel has no kprobes",
    "DEBUG_INFO_BTF": "This kernel does not tell its types",
    "BPF_SYSCALL": "This kernel runs no BPF programs",
    "MEMCG": "it cannot be told to which process an address space belongs",
    "KPROBES": "This kernel has no kprobes",
}
# What goes with an option.
FOLLOWING = {"KPROBES": ("KPROBE_EVENTS",), "BPF_SYSCALL": ("BPF_JIT", "DEBUG_INFO_BTF")}
NOTHING = "nothing"
# What bcc wants of a kernel's headers, of the source's directory and of the one that it was built in.
HEADERS = {
    "source": ("include", "arch/x86/include"),
    "build": ("include", "arch/x86/include/generated"),
}
# Runs a command in the root that is its first word, where its second is /var/tmp.
ENTER = """
mount --bind "$2" "$1/var/tmp"
mount -t tmpfs none "$1/tmp"
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
root=$1
shift 2
cd /
exec env -u PWD -u OLDPWD chroot "$root" "$@"
"""
# Runs its words between two looks at what the kernel has of programs and probes.
MARK = "----\n"
SHOW = f"""
look() {{ bpftool -j prog show 2>&1; cat /sys/kernel/debug/kprobes/list 2>&1; }}
look; echo {MARK.strip()}; "$@"; status=$?; echo {MARK.strip()}; look; exit $status
"""
REFUSED = ("kvirt", "trace", "--", "true")
# Mappings that are moved while they are traced, and no lines on its stdin, for which it would do more.
MOVES = 100
EVENTS = f"python3 -m kvirt.lab.bench.events copy-vma {MOVES} </dev/null >/dev/null"
COUNTED = ("kvirt", "trace", "--format", "json", "--", "sh", "-c", EVENTS)
# Seconds for a command in a guest without KVM on a busy host.
PATIENCE = 300


class Build:
    """Kernels of one source, that differ by what they lack."""

    def __init__(self, debian, report):
        """Prepare.

        :param debian: the kernel of Debian's whose source it is
        """
        self._version = source_version(debian.release)
        self._suite = apt.Suite(debian.suite)
        self._report = report
        key = hashlib.sha256(json.dumps([debian.release, PACKAGES, OPTIONS]).encode()).hexdigest()[:12]
        self._dir = cache_dir() / f"lacking-{self._version}-{key}"
        # Until all have been built: the next ones take less time.
        self._scratch = self._dir / "scratch"
        self._source = self._scratch / f"linux-source-{self._version}"

    def all(self):
        """Return the kernels, by what they lack."""
        with locked(self._dir.name):
            kernels = {lacks: self._kernel(lacks) for lacks in (NOTHING, *LACKING)}
            shutil.rmtree(self._scratch, ignore_errors=True)
        return kernels

    def _kernel(self, lacks):
        image, modules = self._dir / lacks / "vmlinuz", self._dir / "modules"
        if not image.exists():
            self._fetch()
            with step(self._report, f"Building a kernel that lacks {lacks}", "building"):
                self._make(lacks)
            if lacks == NOTHING:
                for name, parts in HEADERS.items():
                    top = self._source if name == "source" else self._scratch / "out"
                    for part in parts:
                        shutil.copytree(top / part, modules / name / part, dirs_exist_ok=True)
            image.parent.mkdir(parents=True, exist_ok=True)
            (self._scratch / "out/arch/x86/boot/bzImage").rename(image)
        return Kernel(Kernel.from_files(image, None).release, image, modules=modules)

    def _fetch(self):
        if not self._source.exists():
            with built(self._source) as directory:
                fetch_source(self._suite, self._version, directory, self._report)

    def _make(self, lacks):
        (self._scratch / "out").mkdir(exist_ok=True)
        chosen = [f"CONFIG_{name}={'n' if name == lacks else 'y'}\n" for name in OPTIONS]
        (self._scratch / "options").write_text("".join(chosen))
        root = get_root(self._report, PACKAGES)
        make = ["make", "-s", f"-j{os.cpu_count()}", "-C", f"/var/tmp/{self._source.name}", "O=/var/tmp/out"]
        enter = [host.program("unshare"), "--mount", "--pid", "--fork", "--kill-child"]
        enter += ["sh", "-ec", ENTER, "sh", str(root), str(self._scratch)]
        self._run(*enter, *make, "KCONFIG_ALLCONFIG=/var/tmp/options", "allnoconfig")
        built = (self._scratch / "out" / ".config").read_text()
        missing = {name for name in OPTIONS if f"CONFIG_{name}=y\n" not in built}
        if missing != ({lacks, *FOLLOWING.get(lacks, ())} - {NOTHING}):
            raise KvirtError(f"Linux {self._version} cannot be built so: it lacks {', '.join(missing)}.")
        self._run(*enter, *make, "bzImage")

    def _run(self, *argv):
        done = host.run(argv)
        if done.returncode != 0:
            raise KvirtError(
                f"A kernel could not be built in {self._scratch}: see what {argv[0]} said.\n"
                + done.stderr.strip()[-2000:]
            )


def tried(guest, argv):
    """Trace in a guest; return what came of it, what to print of that, and whether it left nothing."""
    done = guest.run(["sh", "-c", SHOW, "sh", *argv], PATIENCE)
    before, said, after = done.stdout.split(MARK)
    left = "the same as before" if before == after else f"NOT the same as before: {after}"
    about = f"exit status {done.returncode}, the kernel's programs and probes are {left}"
    return done.returncode, said, done.stderr, about, before == after


def refused(guest, words):
    """Trace where it cannot be done; return whether all is as it has to be, and what to print of it."""
    status, out, err, about, good = tried(guest, REFUSED)
    good = good and status == 2 and out == "" and words in err
    return good and re.fullmatch(r"kvirt: [^\n]+\.\n", err) is not None, f"{about}\n{err.strip()}"


def counted(guest):
    """Trace where it can be done; return the same."""
    status, out, err, about, good = tried(guest, COUNTED)
    if status != 0:
        return False, f"{about}\n{err.strip()}"
    document = json.loads(out)
    copies = sum(document["copy_vma"][name] for name in ("hit", "fallback"))
    absent = [name for name, state in document["probes"].items() if state != "attached"]
    said = f"{about}, {copies} of {MOVES} copies of VMAs are counted"
    return good and copies == MOVES, f"{said}; not in this kernel: {', '.join(absent) or 'nothing'}"


@click.command(help=__doc__)
@click.option("--kernel", default="7.3", show_default=True, help="A version of Debian's.")
def main(kernel):
    """Build, boot and trace; the exit status is 0 only if each kernel had what it was to have said."""
    report = TerminalReport()
    host.require_root("A guest")
    failed = False
    try:
        for lacks, built in Build(get_kernel(kernel, report), report).all().items():
            with Guest(built, report=report) as guest:
                good, said = counted(guest) if lacks == NOTHING else refused(guest, LACKING[lacks])
            lacks = lacks if lacks == NOTHING else f"CONFIG_{lacks}"
            click.echo(f"Linux {built.release} that lacks {lacks}: {'' if good else 'FAIL: '}{said}")
            failed |= not good
    except KvirtError as error:
        raise click.ClickException(str(error)) from None
    sys.exit(failed)


if __name__ == "__main__":
    main()
