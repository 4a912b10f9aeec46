"""Boot a guest with emulated NICs on this machine's own files: `python -m tools.guest run --nic virtio:SOCK -- CMD`.

The guest sees the whole file tree of this machine, read-only under a layer of its own in memory: nothing that it does
there outlives it. Python, the checkout and compiled kernels are where they are here. QEMU emulates everything (no
KVM), so it runs wherever there is a processor, as any user.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import Refused, guest_parts, main, uid

# QEMU's devices by the names used here. Those on a port of their own are PCI Express, behind bus 1, 2, …; the others
# sit on the root bus, where an I/O port BAR is possible.
NICS = {
    "virtio": ("virtio-net-pci,disable-legacy=on", False),
    "virtio-legacy": ("virtio-net-pci,disable-modern=on,disable-legacy=off", False),
    "virtio-transitional": ("virtio-net-pci,disable-legacy=off", False),
    "igb": ("igb", True),
    "e1000e": ("e1000e", True),
    "vmxnet3": ("vmxnet3", True),
}
FIRST_SLOT = 0x10  # of the NICs (or their ports) on the root bus; QEMU's own devices lie below
SHARE = "/run/guest"  # where the guest has the run folder, which it may write to

INIT = """#!/bin/sh
export PATH=/bin
b() { busybox "$@"; }
b mount -t proc proc /proc; b mount -t sysfs sys /sys; b mount -t devtmpfs dev /dev
for module in /modules/*; do b insmod $module; done
options=trans=virtio,version=9p2000.L,msize=512000
b mount -t 9p -o ro,$options,cache=loose files /lower || b poweroff -f
b mount -t tmpfs -o size=50% tmpfs /over; b mkdir /over/upper /over/work
b mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work overlay /root
b mkdir -p /root@SHARE
for name in proc sys dev; do b mount --move /$name /root/$name; done
b mount -t 9p -o rw,$options,cache=none share /root@SHARE || b poweroff -f
exec busybox switch_root /root /bin/sh @SHARE/start
""".replace("@SHARE", SHARE)

# The second half: what a distribution's init would do, as far as the command can notice.
START = """exec </dev/null
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/shm /dev/pts /dev/virtio-ports /lib/modules/{version}
mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mount -t devpts devpts /dev/pts
mount --bind {modules} /lib/modules/{version}
[ -e /sbin/modprobe ] || {{ echo '#!/bin/sh'; echo 'exec {modprobe} "$@"'; }} >/sbin/modprobe && chmod +x /sbin/modprobe
for port in /sys/class/virtio-ports/*; do ln -s ../${{port##*/}} /dev/virtio-ports/$(cat $port/name); done
{busybox} ip link set lo up; {busybox} hostname guest
{reach}
cd {cwd}
echo "guest: up after $(cut -d' ' -f1 /proc/uptime) s" >/dev/console
{user} sh -c "$(cat {share}/command)" >/dev/virtio-ports/stdout 2>/dev/virtio-ports/stderr
echo $? >{share}/exit.new; mv {share}/exit.new {share}/exit
{busybox} poweroff -f
"""


def nic_options(nics, iommu):
    """QEMU's arguments for `nics`, a list of (kind, socket path or None), and the PCI address of each in the guest."""
    words, addresses, ports = [], [], 0
    for k, (kind, path) in enumerate(nics):
        device, on_port = NICS[kind]
        slot, mac = f"{FIRST_SLOT + k:#x}", f"52:54:00:00:00:{k + 1:02x}"
        if iommu and kind == "virtio":  # legacy devices know of no IOMMU and reach memory past it
            device += ",iommu_platform=on"
        if on_port:
            ports += 1
            words += ["-device", f"pcie-root-port,id=port{k},chassis={k + 1},addr={slot}"]
        place = f"bus=port{k}" if on_port else f"addr={slot}"
        words += ["-netdev", f"stream,id=net{k},server=off,addr.type=unix,addr.path={path}" if path else
                  f"user,id=net{k},restrict=on",
                  "-device", f"{device},netdev=net{k},mac={mac},romfile=,{place}"]
        addresses.append(f"0000:{ports:02x}:00.0" if on_port else f"0000:00:{FIRST_SLOT + k:02x}.0")
    return words, addresses


class Guest:
    """A guest that runs `command` (a list of words) and powers off: `with Guest([…]) as guest: guest.wait(60)`.

    nics       [(kind, path)]: kinds as in NICS; on the unix socket `path` somebody listens already, and each frame has
               its length in front, 4 bytes big-endian. None: frames go nowhere.
    iommu      an emulated Intel IOMMU in front of the NICs
    user       the uid (and gid) that the command runs as, instead of root
    devices    more of QEMU's arguments
    channels   {name: path}: unix sockets on which QEMU listens, /dev/virtio-ports/NAME in the guest
    hugepages  of 2 MiB, set aside at boot
    `addresses` are the NICs' in the guest, in order; `folder` is the guest's SHARE. It is removed at the end.
    """

    def __init__(self, command, *, nics=(), iommu=False, user=None, channels=None, devices=(), memory="2G",
                 hugepages=64, append="", environment=None):
        self.parts = guest_parts.parts()
        self._command, self._user, self._environment = command, user, environment or {}
        self._iommu, self._memory, self._channels = iommu, memory, channels or {}
        self._append = f"hugepages={hugepages} {append}"
        self._nics, self.addresses = nic_options(nics, iommu)
        self._devices = list(devices)
        self.folder, self._process = None, None

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="guest-"))
        try:
            self._write_scripts()
            with open(self.folder / "qemu", "wb") as log:
                self._process = subprocess.Popen(self._qemu(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                                 start_new_session=True)  # Ctrl-C is for us
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder)

    @property
    def running(self):
        return self._process.poll() is None

    def wait(self, timeout_s):
        """The command's exit code. `Refused` if it has not ended after `timeout_s` seconds, or the guest has died."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise late(timeout_s) from None
        if not (self.folder / "exit").exists():
            raise Refused(f"the guest ended before its command: {self.text('qemu').strip() or 'see its console'}")
        return int(self.text("exit"))

    def text(self, name):
        """The console so far, the command's stdout or stderr, or what QEMU says: `name` is a file in the run folder."""
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def _write_scripts(self):
        parts, quote = self.parts, shlex.quote
        user = f"setpriv --reuid {self._user} --regid {self._user} --clear-groups" if self._user else ""
        (self.folder / "initramfs").write_bytes(parts.initramfs(INIT))
        (self.folder / "start").write_text(START.format(
            version=parts.version, modules=quote(str(parts.modules)), busybox=quote(str(parts.busybox)), share=SHARE,
            modprobe=shlex.join(parts.command("usr/bin/kmod", name="modprobe")), cwd=quote(os.getcwd()),
            user=user, reach=_reach(self._exported().get("PYTHONPATH", ""))))
        (self.folder / "command").write_text("".join(
            f"export {name}={quote(value)}\n" for name, value in self._exported().items())
            + f"exec {shlex.join(map(str, self._command))}\n")

    def _exported(self):
        kept = ("HOME", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "XDG_CACHE_HOME")
        own = {name: value for name, value in os.environ.items()
               if name in kept or name.startswith(("NUMBA_", "IXY_NUMBA_"))}
        path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
        return {**own, "PATH": path, **portable_kernels(), "GUEST_NICS": " ".join(self.addresses), **self._environment}

    def _qemu(self):
        words = [*self.parts.qemu(), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                 "-run-with", "exit-with-parent=on", "-machine", "q35" + ",kernel-irqchip=split" * self._iommu,
                 "-accel", "tcg,thread=single", "-cpu", "Nehalem", "-smp", "1", "-m", self._memory,
                 "-kernel", str(self.parts.kernel), "-initrd", str(self.folder / "initramfs"),
                 "-serial", f"file:{self.folder / 'console'}",
                 # no_timer_check, nowatchdog: on a busy machine the guest's time stands still now and then
                 "-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off no_timer_check nowatchdog "
                 + "intel_iommu=on iommu=nopt " * self._iommu + self._append]
        if self._iommu:
            words += ["-device", "intel-iommu,intremap=on,caching-mode=on"]
        for tag, path, more in (("files", "/", ",readonly=on,multidevs=remap"), ("share", self.folder, "")):
            words += ["-fsdev", f"local,id={tag},path={path},security_model=none{more}",
                      "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        words += ["-device", "virtio-serial-pci"]
        ports = {name: ("file", f"path={self.folder / name}") for name in ("stdout", "stderr")}
        ports |= {name: ("socket", f"path={path},server=on,wait=off") for name, path in self._channels.items()}
        for name, (kind, place) in ports.items():
            words += ["-chardev", f"{kind},id={name},{place}", "-device", f"virtserialport,chardev={name},name={name}"]
        return words + self._nics + self._devices


def portable_kernels():
    """The environment in which kernels are compiled for any x86-64: the guest then finds those that the host made."""
    return {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


def _reach(python_path):
    """Shell lines that let every user into the folders that Python needs. They change the guest's own layer only."""
    places = [Path.cwd(), Path(sys.prefix), Path(sys.base_prefix), guest_parts.cache_folder(),
              *(Path(one).absolute() for one in python_path.split(":") if one)]
    parents = sorted({str(parent) for place in places for parent in [place, *place.parents]})
    cache = shlex.quote(str(guest_parts.cache_folder().parent))  # of compiled kernels
    return (f"mkdir -p {cache}; chmod a+rx {shlex.join(parents)} 2>/dev/null\n"
            f"find {cache} -maxdepth 1 -type d -exec chmod a+rwx '{{}}' +")


def follow(guest, timeout_s):
    """Copy the command's output to ours as it comes, and return its exit code; see `Guest.wait`."""
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        streams = []
        for name, ours in (("stdout", sys.stdout), ("stderr", sys.stderr)):
            (guest.folder / name).touch()
            streams.append((stack.enter_context(open(guest.folder / name, "rb")), ours))
        running = True
        while running and time.monotonic() < deadline:
            running = guest.running  # before the last look
            for source, ours in streams:
                ours.buffer.write(source.read())
                ours.flush()
            time.sleep(0.02)
    if running:
        raise late(timeout_s)
    return guest.wait(1)


def late(timeout_s):
    return Refused(f"the guest did not end within {timeout_s:g} s")


def nic(text):
    """An argparse type: KIND or KIND:SOCKET."""
    kind, _, path = text.partition(":")
    if kind not in NICS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KIND or KIND:SOCKET, KIND one of {', '.join(NICS)}")
    if "," in path:
        raise argparse.ArgumentTypeError(f"{text!r}: QEMU takes no comma in a path")
    return kind, path or None


def writable(text):
    """An argparse type: a file that can be written to, tried now and not when the guest has ended."""
    try:
        open(text, "a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None
    return Path(text)


def arguments():
    parser = argparse.ArgumentParser(prog="python -m tools.guest", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="setup|run")
    setup = verbs.add_parser("setup", allow_abbrev=False, help="fetch QEMU and a kernel from Debian (140 MB), once",
                             description="Fetch QEMU, a Linux kernel and busybox from the Debian mirror that this "
                             f"machine uses, and unpack them in {guest_parts.cache_folder()}. Installs nothing.")
    setup.add_argument("--mirror", metavar="URL", help="Debian mirror, if this machine's package sources name none")
    setup.add_argument("--again", action="store_true", help="fetch them even if they are there")
    run = verbs.add_parser("run", allow_abbrev=False, help="boot a guest, run a command in it, return its exit code",
                           description="Boot a guest, run a command in it, in this folder, exit with its exit code. "
                           "There $GUEST_NICS lists the NICs' PCI addresses.")
    run.add_argument("--nic", action="append", default=[], type=nic, metavar="KIND[:SOCKET]",
                     help=f"an emulated NIC ({', '.join(NICS)}); connects to the unix socket, each frame behind its "
                     "length in 4 bytes, big-endian")
    run.add_argument("--iommu", action="store_true", help="with an emulated Intel IOMMU")
    run.add_argument("--memory", default="2G", help="default 2G")
    run.add_argument("--hugepages", type=int, default=64, metavar="N", help="huge pages of 2 MiB (default 64)")
    run.add_argument("--user", type=uid, metavar="UID", help="run the command as this user, not as root")
    run.add_argument("--append", default="", metavar="WORDS", help="more for the kernel's command line")
    run.add_argument("--timeout", type=float, default=300, metavar="S", help="end the guest after S seconds (300)")
    run.add_argument("--console", type=writable, metavar="FILE",
                     help="keep the console's log (default: after a failure only)")
    run.add_argument("command", nargs="+", metavar="-- COMMAND …")
    return parser


def keep_console(guest, path):
    try:
        path.write_text(guest.text("console"))
        print(f"console: {path}", file=sys.stderr)
    except OSError as error:  # how the command ended counts for more
        print(f"the console is lost: {path}: {error.strerror}", file=sys.stderr)


def run(args):
    with Guest(args.command, nics=args.nic, iommu=args.iommu, user=args.user, memory=args.memory,
               hugepages=args.hugepages, append=args.append) as guest:
        code = None
        try:
            code = follow(guest, args.timeout)
        finally:
            if args.console or code != 0:
                keep_console(guest, args.console or guest_parts.cache_folder() / "last-console.log")
    return code


def command(argv=None):
    args = arguments().parse_args(argv)
    if args.verb == "setup":
        print(f"guest parts are in {guest_parts.set_up(print, args.mirror, args.again).root.parent}")
        return 0
    return run(args)


if __name__ == "__main__":
    main(command)
