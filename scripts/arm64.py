# SPDX-License-Identifier: GPL-2.0-only
"""Checks a dump of an emulated arm64 guest with a kernel of Debian's, and the workload in it.

Everything comes from Debian: the kernel and its debug file, and a Python in an initramfs, on which the
workload runs. What kvirt reads of each region is compared with what the workload says of it.
"""

import json
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from kvirt.checks.process import ProcessChecker
from kvirt.checks.task import list_vmas
from kvirt.errors import KvirtError
from kvirt.lab import apt, host, initramfs, kernels, vmcore
from kvirt.lab.cache import built, cache_dir, locked
from kvirt.lab.progress import TerminalReport, step
from kvirt.lab.qmp import Qmp
from kvirt.layout import layout_of
from kvirt.scheme import Scheme
from kvirt.target import open_target
from kvirt.tasks import find_process

TREE = Path(__file__).resolve().parents[1]
PYTHON_SUITE = "trixie"
PYTHON = (
    *("busybox-static", "libc6", "libexpat1", "libffi8", "libgcc-s1", "zlib1g"),
    *("libpython3.13-minimal", "libpython3.13-stdlib", "python3.13-minimal"),
)
# Those that are modules, each behind those that it depends on.
MODULES = ("zsmalloc", "lz4hc_compress", "lz4hc", "lzo", "lzo-rle", "qemu_fw_cfg", "zram")
INIT = """\
#!/usr/bin/busybox sh
/usr/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
for module in /modules/*; do insmod $module; done
# The port has no name without udev.
while ! [ -e /dev/vport0p1 ]; do sleep 1; done
cd /root
# The workload ends with its standard input.
sleep 1000000 | PYTHONPATH=/kvirt python3.13 -m kvirt.lab.workload --with hugetlb,ksm,swap >/dev/vport0p1
poweroff -f
"""
# Of dumps. QEMU does not say in the second which architecture it is of, and its blocks are larger than pages.
FORMATS = ("elf", "kdump-zlib")
# Seconds for a guest that is emulated on a busy host, and its memory: hugetlb pages can be large.
PATIENCE = 1200
MEMORY = "4G"


def get_python(report):
    """Fetch what the workload runs on: a directory."""
    target = cache_dir() / "arm64" / "python"
    if not target.exists():
        suite = apt.Suite(PYTHON_SUITE, "arm64")
        suite.update()
        with built(target) as directory, tempfile.TemporaryDirectory(prefix="kvirt-arm64-") as scratch:
            for package in PYTHON:
                apt.unpack(suite.download(package, Path(scratch), report, "python"), directory)
    return target


def archive(python, modules):
    """The initramfs: Python, the workload, modules and what starts them."""
    made = ("bin", "dev", "proc", "root", "sys", "tmp", "modules", "kvirt", "kvirt/kvirt", "kvirt/kvirt/lab")
    parts = [initramfs.entry(name, stat.S_IFDIR | 0o755) for name in made]
    parts.append(initramfs.entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    parts.append(initramfs.entry("init", stat.S_IFREG | 0o755, INIT.encode()))
    # The loader is looked for in /lib.
    parts.append(initramfs.entry("lib", stat.S_IFLNK | 0o777, b"usr/lib"))
    workload = [TREE / "kvirt" / "lab" / "workload", TREE / "kvirt" / "lab" / "procfs.py"]
    files = [(TREE / "kvirt" / name, f"kvirt/kvirt/{name}") for name in ("__init__.py", "errors.py")]
    files.append((TREE / "kvirt" / "lab" / "__init__.py", "kvirt/kvirt/lab/__init__.py"))
    for source in workload:
        inside = [source, *source.rglob("*.py")] if source.is_dir() else [source]
        files += [(path, str(Path("kvirt") / path.relative_to(TREE))) for path in inside]
    files += [(path, str(path.relative_to(python))) for path in sorted(python.rglob("*"))]
    for path, name in files:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            parts.append(initramfs.entry(name, mode, bytes(path.readlink())))
        else:
            parts.append(initramfs.entry(name, mode, b"" if path.is_dir() else path.read_bytes()))
    for number, name in enumerate(MODULES):
        for path in modules.rglob(f"{name}.ko*"):
            file = f"modules/{number}-{name}.ko"
            parts.append(initramfs.entry(file, stat.S_IFREG | 0o644, initramfs.module(path)))
    return b"".join([*parts, initramfs.entry("TRAILER!!!", 0)])


def wait_for_document(qemu, path, console):
    """What the workload says of itself, once it stands."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and qemu.poll() is None:
        time.sleep(1)
        text = path.read_text()
        if text.endswith("\n"):
            return json.loads(text)
    tail = "\n".join(console.read_text(errors="replace").splitlines()[-20:])
    raise KvirtError(f"The workload does not stand in the guest. Its console ends:\n{tail}")


def dump(kernel, python, cpu, directory, report):
    """Boot a guest and dump it: a core of each format, and what the workload in it says."""
    (directory / "initramfs").write_bytes(archive(python, kernel.modules))
    argv = [host.program("qemu-system-aarch64"), "-accel", "tcg,thread=multi", "-machine", "virt"]
    argv += ["-cpu", cpu, "-smp", "2", "-m", MEMORY, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-device", "vmcoreinfo", "-kernel", kernel.image]
    argv += ["-initrd", directory / "initramfs", "-append", "console=ttyAMA0 panic=-1 rdinit=/init"]
    argv += ["-chardev", f"file,id=console,path={directory / 'console'}", "-serial", "chardev:console"]
    argv += ["-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off", "-device", "virtio-serial-pci"]
    argv += ["-chardev", f"file,id=workload,path={directory / 'workload'}"]
    argv += ["-device", "virtserialport,chardev=workload,name=workload"]
    (directory / "workload").touch()
    qemu = host.start(argv, stderr=None)
    try:
        with step(report, "Waiting for the workload", "guest"):
            workload = wait_for_document(qemu, directory / "workload", directory / "console")
        cores = {format_: directory / f"vmcore-{format_}" for format_ in FORMATS}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(directory / "qmp.sock"))
            qmp = Qmp(connection)
            qmp.execute("stop")
            for format_, core in cores.items():
                with core.open("wb") as file:
                    vmcore.write(qmp, file, format_)
    finally:
        host.end(qemu)
    return cores, workload


def check(core, vmlinux, *options):
    """Run check-all."""
    argv = [sys.executable, "-m", "kvirt", "-c", core, "-s", vmlinux, "check-all", *options]
    return subprocess.run(
        [str(word) for word in argv], cwd=TREE, check=False, stdout=subprocess.PIPE, text=True
    )


def document(core, vmlinux):
    """What check-all says in JSON, but for the name of the core."""
    done = check(core, vmlinux, "--format", "json")
    if not done.stdout:
        raise KvirtError(f"check-all said nothing of {core.name}, and ended with status {done.returncode}.")
    said = json.loads(done.stdout)
    del said["target"]["location"]
    return said


def compare(core, vmlinux, workload):
    """Compare each region's VMA with what the workload says: how many, and the names of wrong ones."""
    target = open_target(core=core, symbols=[vmlinux])
    layout = layout_of(target.prog)
    checker = ProcessChecker(target.prog, layout, moves=False)
    legacy = layout.scheme is Scheme.LEGACY
    found = {}
    for pid in {region["pid"] for region in workload["regions"]}:
        for row in list_vmas(checker, find_process(target.prog, pid))[1]:
            found[pid, row.vma.vm_start] = row.vma
    wrong = []
    for region in workload["regions"]:
        vma = found.get((region["pid"], int(region["start"], 16)))
        vm_pgoff = region.get("legacy_vm_pgoff", region["vm_pgoff"]) if legacy else region["vm_pgoff"]
        said = [region["end"], vm_pgoff, None if legacy else region["anon_pgoff"], region["faulted"]]
        seen = None
        if vma is not None:
            seen = [hex(vma.vm_end), hex(vma.vm_pgoff), hex(vma.anon_pgoff), vma.anon_vma != 0]
        if seen is None or any(a not in (None, b) for a, b in zip(said, seen, strict=True)):
            wrong.append(region["name"])
    return len(workload["regions"]), wrong


@click.command(help=__doc__)
@click.option("--kernel", default="7.3", show_default=True, help="A version.")
@click.option("--flavour", default="cloud-arm64", show_default=True, help="arm64-16k has pages of 16 KiB.")
@click.option("--cpu", default="max", show_default=True, help="One of QEMU's.")
def main(kernel, flavour, cpu):
    """Boot, dump, check and compare; the exit status is that of check-all, or 1."""
    report = TerminalReport()
    host.require_root("arm64")
    try:
        with locked("arm64"):
            python = get_python(report)
        found = kernels.fetch_kernel(kernel, kernels.Flavour(flavour, "arm64"), report)
        with tempfile.TemporaryDirectory(prefix="kvirt-arm64-") as directory:
            cores, workload = dump(found, python, cpu, Path(directory), report)
            core, vmlinux = cores["elf"], found.vmlinux
            done = check(core, vmlinux)
            click.echo(done.stdout, nl=False)
            number, wrong = compare(core, vmlinux, workload)
            first, *others = (document(core, vmlinux) for core in cores.values())
    except KvirtError as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        f"\n{number - len(wrong)} of {number} regions have the offsets that the workload says they have"
    )
    for name in wrong:
        click.echo(f"wrong: {name}")
    same = all(other == first for other in others)
    click.echo(
        f"check-all says {'the same' if same else 'different things'} of the cores of formats "
        f"{', '.join(FORMATS)}"
    )
    sys.exit(done.returncode if same and not wrong else 1)


if __name__ == "__main__":
    main()
