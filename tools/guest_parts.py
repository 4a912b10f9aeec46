"""What a guest is made of: QEMU, a Linux kernel and busybox, unpacked from Debian's packages into a cache folder.

Nothing is installed on this machine and no root is needed: apt works on lists of its own, and the programs run through
the dynamic linker and the libraries that came with them.
"""

import contextlib
import fcntl
import lzma
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from . import Refused

SUITE = "trixie"
SUITES = (SUITE, f"{SUITE}-backports")  # backports: QEMU >= 10.1, which also speaks vfio-user
PACKAGES = ("qemu-system-x86", "busybox-static", "kmod")
KERNEL = "linux-image-amd64"
RECIPE = " ".join((*SUITES, *PACKAGES, KERNEL))
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What the guest needs before it has the host's files, in the order of their dependencies.
BOOT_MODULES = ("netfs", "9pnet", "9p", "9pnet_virtio", "overlay")


def cache_folder():
    """Where the parts are kept: $XDG_CACHE_HOME/ixy_numba/guest, by default under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return Path(root if os.path.isabs(root) else os.path.expanduser("~/.cache")) / "ixy_numba" / "guest"


def parts():
    """The parts that a set-up has left in the cache folder; `Refused` if there are none."""
    root = cache_folder() / "root"
    stamp = root / "recipe"
    if not stamp.is_file() or stamp.read_text() != RECIPE:
        raise Refused(f"no guest parts in {root.parent}; fetch them first: python -m tools.guest setup")
    return Parts(root)


class Parts:
    """The parts unpacked in folder `root`."""

    def __init__(self, root):
        self.root = root
        self.version = next((self.root / "lib/modules").iterdir()).name
        self.kernel = self.root / "boot" / f"vmlinuz-{self.version}"
        self.modules = self.root / "lib/modules" / self.version
        self.busybox = self.root / "usr/bin/busybox"

    def command(self, program, *, name=None):
        """The words that start an unpacked program (`usr/bin/…`) with its own libraries, as if it were called `name`.
        """
        linker = [str(self.root / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path",
                  str(self.root / "usr/lib/x86_64-linux-gnu")]
        return [*linker, *(["--argv0", name] if name else []), str(self.root / program)]

    def qemu(self):
        """The words that start QEMU, with its firmware."""
        firmware = [word for name in ("qemu", "seabios") for word in ("-L", str(self.root / "usr/share" / name))]
        return [*self.command("usr/bin/qemu-system-x86_64"), *firmware]

    def initramfs(self, init):
        """A cpio archive (newc) of busybox, the modules that mount the host's files, and `init`, a shell script."""
        entries = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys", "modules", "lower",
                                                                   "over", "root")]
        entries += [("bin/busybox", stat.S_IFREG | 0o755, self.busybox.read_bytes()),
                    ("bin/sh", stat.S_IFLNK | 0o777, b"busybox"), ("init", stat.S_IFREG | 0o755, init.encode())]
        for k, name in enumerate(BOOT_MODULES):
            packed = next(self.modules.rglob(f"{name}.ko.xz")).read_bytes()
            entries.append((f"modules/{k}-{name}.ko", stat.S_IFREG | 0o644, lzma.decompress(packed)))
        return b"".join(_cpio(k, *entry) for k, entry in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1))


def _cpio(number, name, mode, data):
    raw = name.encode() + b"\0"
    header = b"070701" + b"".join(b"%08X" % value for value in (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0,
                                                                len(raw), 0))
    return b"".join(part + bytes(-len(part) % 4) for part in (header + raw, data))


def set_up(say, mirror=None, again=False):
    """Fetch and unpack the parts unless they are there (or `again`); returns them. About 140 MB, 300 MB unpacked."""
    folder = cache_folder()
    if os.uname().machine != "x86_64":
        raise Refused(f"the guest runs this machine's own programs and is x86-64, this machine is {os.uname().machine}")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not again:
            with contextlib.suppress(Refused):
                return parts()
        with tempfile.TemporaryDirectory(dir=folder, prefix="setup-") as scratch:
            _fetch(Path(scratch), mirror or debian_mirror(), say)
            _unpack(Path(scratch), say)
            shutil.rmtree(folder / "root", ignore_errors=True)
            os.rename(Path(scratch) / "root", folder / "root")
        return parts()


def debian_mirror():
    """The mirror that this machine itself fetches Debian's packages from."""
    found = re.search(r"'(\S+/debian)/+dists/", _output(["apt-get", "update", "--print-uris"]))
    if found:
        return found[1]
    raise Refused("this machine's package sources name no Debian mirror; give one: --mirror URL")


def _fetch(scratch, mirror, say):
    """Download the packages and all that they depend on to scratch/cache/archives."""
    for name in ("state/lists/partial", "cache/archives/partial", "none"):
        (scratch / name).mkdir(parents=True)
    (scratch / "status").touch()  # as if nothing were installed: every library comes along
    signed = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    (scratch / "sources").write_text("".join(f"deb {signed}{mirror} {suite} main\n" for suite in SUITES))
    settings = {"Dir::State": "state", "Dir::State::status": "status", "Dir::Cache": "cache",
                "Dir::Etc::sourcelist": "sources", "Dir::Etc::sourceparts": "none", "Dir::Etc::preferences": "none",
                "Dir::Etc::preferencesparts": "none"}
    options = [f"-o{key}={scratch / value}" for key, value in settings.items()]
    options += ["-oAPT::Sandbox::User=root", "-oAPT::Architecture=amd64"]
    say(f"fetching package lists and packages ({SUITES[-1]}, 140 MB) …")
    _output(["apt-get", *options, "update", "-qq"])
    depends = _output(["apt-cache", *options, "depends", KERNEL])
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if not kernel:
        raise Refused(f"{KERNEL} of {SUITE} depends on no kernel: {depends!r}")
    _output(["apt-get", *options, "install", "-qq", "--yes", "--download-only", "--no-install-recommends",
             "-t", SUITES[-1], *PACKAGES])
    _output(["apt-get", *options, "download", "-qq", kernel[1]], cwd=scratch / "cache/archives")


def _unpack(scratch, say):
    root = scratch / "root"
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")  # which Debian's package base-files would do
    packages = sorted((scratch / "cache/archives").glob("*.deb"))
    say(f"unpacking {len(packages)} packages …")
    for package in packages:
        _output(["dpkg", "-x", package, root])
    made = Parts(root)
    _output([*made.command("usr/bin/kmod", name="depmod"), "-b", root, made.version])
    (root / "recipe").write_text(RECIPE)  # last: now it is complete


def _output(command, **more):
    """What a command prints; `Refused` with its last words if it fails or is not there."""
    try:
        done = subprocess.run([str(word) for word in command], text=True, stdin=subprocess.DEVNULL, timeout=1200,
                              capture_output=True, env={**os.environ, "LC_ALL": "C"}, **more)
    except FileNotFoundError:
        raise Refused(f"{command[0]} is not on this machine; the set-up needs Debian's apt and dpkg") from None
    except subprocess.TimeoutExpired:
        raise Refused(f"{command[0]} did not end within 20 minutes") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise Refused(f"{command[0]} failed: {words[-1]}")
    return done.stdout
