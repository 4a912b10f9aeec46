"""The tools on a machine made of files, and as their users meet them: help, one line for what cannot be."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_pci import FakeMachine

from ixy_numba import IxyError
from ixy_numba.bus.pci import Function
from tools import Misused, Refused, bind, guest, guest_parts, hugepages, registers

ROOT = Path(__file__).parent.parent
A, B, DISK = "0000:03:00.0", "0000:03:00.1", "0000:04:00.0"


def tool(name, *args, code=0):
    done = subprocess.run([sys.executable, "-m", f"tools.{name}", *args], cwd=ROOT, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("args", [("hugepages",), ("bind",), ("registers",), ("guest",), ("guest", "setup"),
                                  ("guest", "run"), ("hugepages", "set"), ("bind", "vfio"), ("bind", "undo")])
def test_help_says_what_a_tool_does(args):
    text = tool(*args, "--help").stdout
    assert f"python -m tools.{args[0]}" in text and len(text.splitlines()) > 6
    if args[1:] in (("set",), ("vfio",), ("undo",)):
        assert "--dry-run" in text


@pytest.mark.parametrize("args, code, word", [
    (("hugepages", "set", "many"), 2, "many"), (("hugepages", "set", "-1"), 2, "-1"),
    (("hugepages", "set", "1", "--node", "77", "--dry-run"), 2, "node 77"),
    (("bind", "vfio", "ffff:ff:1f.7", "--dry-run"), 2, "no PCI device"), (("bind", "frobnicate"), 2, "frobnicate"),
    (("registers", "sim:nonsense"), 2, "nonsense"), (("registers", "sim", "CTRL", "NOPE"), 2, "NOPE"),
    (("registers", "sim", "EICR"), 1, "EICR"), (("registers", "vhost-user:/nowhere"), 2, "expected a PCI address"),
    (("registers", "ffff:ff:1f.7"), 2, "no PCI device"),
    (("bind", "vfio", A, "--user", "-1"), 2, "a uid"), (("bind", "vfio", A, "--user", "4294967295"), 2, "a uid"),
    (("guest", "run", "--user", "99999999999", "--", "true"), 2, "a uid"),
    (("guest", "run", "--console", "/nowhere/log", "--", "true"), 2, "/nowhere/log"),
    (("guest", "run", "--nic", "token-ring", "--", "true"), 2, "token-ring"), (("guest", "run"), 2, "COMMAND"),
])
def test_what_cannot_be_is_one_line(args, code, word):
    done = tool(*args, code=code)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and word in lines[0] and not done.stdout


# ---- huge pages

@pytest.fixture
def nodes(tmp_path):
    """Two NUMA nodes with huge pages of both sizes, none set aside."""
    (tmp_path / "run").mkdir()
    for node in (0, 1):
        for kb in (2048, 1048576):
            place = tmp_path / f"sys/devices/system/node/node{node}/hugepages/hugepages-{kb}kB"
            place.mkdir(parents=True)
            for name in ("nr_hugepages", "free_hugepages"):
                (place / name).write_text("0\n")
    return tmp_path


def pages(root):
    return {str(place): place.read("nr_hugepages") for place in hugepages.places(root)}


def test_huge_pages_are_set_on_every_node_or_one_and_undone(nodes, capsys):
    assert hugepages.command(["set", "64"], nodes) == 0
    assert hugepages.command(["set", "2", "--size", "1G", "--node", "1"], nodes) == 0
    assert hugepages.command(["set", "128", "--node", "0"], nodes) == 0
    assert pages(nodes) == {"2M on node 0": 128, "1G on node 0": 0, "2M on node 1": 64, "1G on node 1": 2}
    capsys.readouterr()
    assert hugepages.command(["status"], nodes) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2M on node 0: 128 pages, 0 free"
    assert hugepages.command(["undo"], nodes) == 0
    assert set(pages(nodes).values()) == {0}
    capsys.readouterr()
    assert hugepages.command(["undo"], nodes) == 0
    assert "nothing to undo" in capsys.readouterr().out


def test_a_dry_run_sets_no_huge_pages(nodes, capsys):
    hugepages.command(["set", "64", "--dry-run"], nodes)
    assert set(pages(nodes).values()) == {0} and not (nodes / hugepages.MEMORY).exists()
    assert "2M on node 1: 0 -> 64 pages (not done: --dry-run)" in capsys.readouterr().out
    hugepages.command(["set", "64"], nodes)
    hugepages.command(["undo", "--dry-run"], nodes)
    assert pages(nodes)["2M on node 0"] == 64


def test_fewer_huge_pages_than_asked_for(nodes, capsys, monkeypatch):
    set_all = hugepages.Place.set
    monkeypatch.setattr(hugepages.Place, "set", lambda place, count: set_all(place, min(count, 10)))
    assert hugepages.command(["set", "64", "--node", "0"], nodes) == 1
    assert "the kernel has 10 now" in capsys.readouterr().out


def test_a_kernel_without_numa_or_without_huge_pages(tmp_path, capsys):
    with pytest.raises(Refused, match="no huge pages"):
        hugepages.command(["status"], tmp_path)
    place = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    place.mkdir(parents=True)
    (place / "nr_hugepages").write_text("3\n")
    (place / "free_hugepages").write_text("1\n")
    hugepages.command(["status"], tmp_path)
    assert capsys.readouterr().out == "2M: 3 pages, 1 free\n"
    with pytest.raises(Misused, match="no huge pages of 1G; there are: 2M"):
        hugepages.command(["set", "1", "--size", "1G"], tmp_path)


def test_nothing_is_set_that_could_not_be_undone(nodes):
    hugepages.command(["set", "64", "--node", "0"], nodes)
    kept = (nodes / hugepages.MEMORY).read_text()
    (nodes / hugepages.MEMORY).with_suffix(".new").mkdir()
    with pytest.raises(Refused, match="nothing could be undone"):
        hugepages.command(["set", "64"], nodes)
    assert pages(nodes)["2M on node 1"] == 0 and (nodes / hugepages.MEMORY).read_text() == kept


def test_a_damaged_memory_is_one_line(nodes):
    (nodes / hugepages.MEMORY).write_text("{")
    with pytest.raises(Refused, match="remove it"):
        hugepages.command(["undo"], nodes)


# ---- drivers

@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two cards of the kernel's driver in IOMMU groups 1 and 2, and a disk; writing to sysfs does what Linux does."""
    made = FakeMachine(tmp_path)
    (tmp_path / "run").mkdir()
    made.add(A, driver="ixgbe", group="1", node=0)
    made.add(B, driver="ixgbe", group="2", node=0)
    made.add(DISK, kind=0x010601, driver="ahci", group="3")
    made.interface(A, "eth1")
    (tmp_path / "sys/bus/pci/drivers/vfio-pci").mkdir(parents=True)
    for address in (A, B, DISK):
        (made.path(address) / "driver_override").write_text("(null)\n")
    for group in "123":
        (tmp_path / "dev/vfio" / group).write_text("")
    write = bind.Steps.write

    def as_linux(steps, path, text):
        write(steps, path, text)
        if steps.dry_run:
            return
        if path.name == "unbind":
            (made.path(text) / "driver").unlink()
        elif path.name == "drivers_probe":
            chosen = (made.path(text) / "driver_override").read_text().strip() or "ixgbe"
            (made.path(text) / "driver").symlink_to(tmp_path / "sys/bus/pci/drivers" / chosen)

    monkeypatch.setattr(bind.Steps, "write", as_linux)
    return made


def drivers(machine):
    return [Function(address, machine.root).driver for address in (A, B)]


def test_bind_to_vfio_and_back(machine, capsys):
    bind.command(["vfio", A, B], machine.root)
    assert drivers(machine) == ["vfio-pci", "vfio-pci"]
    bind.command(["vfio", A], machine.root)
    assert f"{A} (8086:10fb, vfio-pci): nothing to do" in capsys.readouterr().out
    bind.command(["restore", A], machine.root)
    assert drivers(machine) == ["ixgbe", "vfio-pci"]
    bind.command(["unbind", A], machine.root)
    assert drivers(machine) == [None, "vfio-pci"]
    bind.command(["undo"], machine.root)
    assert drivers(machine) == ["ixgbe", "ixgbe"]
    capsys.readouterr()
    bind.command(["undo"], machine.root)
    assert "nothing to undo" in capsys.readouterr().out


def test_undo_passes_over_a_card_that_is_gone(machine, capsys):
    bind.command(["vfio", A, B], machine.root)
    shutil.rmtree(machine.path(A))
    bind.command(["undo"], machine.root)
    assert Function(B, machine.root).driver == "ixgbe" and not (machine.root / bind.MEMORY).exists()
    assert f"note: {A} is no longer there" in capsys.readouterr().out


def test_a_card_that_had_no_driver_has_none_again(machine):
    (machine.path(A) / "driver").unlink()
    bind.command(["vfio", A], machine.root)
    bind.command(["undo"], machine.root)
    assert drivers(machine) == [None, "ixgbe"]
    assert (machine.path(A) / "driver_override").read_text().strip() == ""


def test_every_step_is_printed_as_the_shell_would_do_it(machine, capsys):
    bind.command(["vfio", A, "--user", "1000", "--dry-run"], machine.root)
    sysfs = machine.root / "sys/bus/pci"
    assert capsys.readouterr().out.splitlines() == [
        f"echo vfio-pci > {machine.path(A)}/driver_override", f"echo {A} > {machine.path(A)}/driver/unbind",
        f"echo {A} > {sysfs}/drivers_probe", f"chown 1000 {machine.root}/dev/vfio/1"]
    assert drivers(machine) == ["ixgbe", "ixgbe"] and not (machine.root / bind.MEMORY).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_a_user_is_given_the_group(machine):
    bind.command(["vfio", A, "--user", "65534"], machine.root)
    assert (machine.root / "dev/vfio/1").stat().st_uid == 65534


@pytest.mark.parametrize("verb", ["vfio", "unbind"])
def test_a_card_in_use_is_left_alone(machine, verb):
    (machine.root / "sys/class/net/eth1/flags").write_text("0x1003\n")
    machine.routes(("eth1", "00000000", "00000000"))
    with pytest.raises(Refused, match=f"{A}: in use: its interface eth1 is up and holds the default route; .*--force"):
        bind.command([verb, B, A], machine.root)
    assert drivers(machine) == ["ixgbe", "ixgbe"], "nothing is done to the others either"
    bind.command([verb, A, "--force"], machine.root)
    assert drivers(machine)[0] != "ixgbe"


def test_a_card_that_a_process_drives_is_left_alone(machine):
    with open(machine.path(A) / "config", "rb") as config:
        fcntl.flock(config, fcntl.LOCK_EX)
        with pytest.raises(Refused, match="a process drives it"):
            bind.command(["restore", A], machine.root)


def test_what_is_no_card_and_what_has_no_iommu(machine):
    with pytest.raises(Misused, match="no network card"):
        bind.command(["unbind", DISK], machine.root)
    with pytest.raises(IxyError, match="no PCI device"):
        bind.command(["unbind", "0000:09:00.0"], machine.root)
    machine.add("0000:05:00.0", driver="ixgbe")
    (machine.path("0000:05:00.0") / "driver_override").write_text("(null)\n")
    with pytest.raises(Refused, match="behind no IOMMU"):
        bind.command(["vfio", "0000:05:00.0"], machine.root)


def test_a_driver_that_does_not_take_the_card(machine, monkeypatch):
    monkeypatch.setattr(bind.Steps, "write", lambda *_: None)
    with pytest.raises(Refused, match="vfio-pci has not taken it"):
        bind.command(["vfio", A], machine.root)


def test_status_tells_what_would_happen(machine, capsys):
    machine.add("0000:05:00.0", driver="igb")
    (machine.root / "sys/kernel/iommu_groups/2/devices" / DISK).mkdir()
    bind.command(["vfio", B], machine.root)
    assert f"note: {DISK} (8086:10fb, ahci) is in the same IOMMU group, 2" in capsys.readouterr().out
    bind.command(["status"], machine.root)
    assert capsys.readouterr().out.splitlines() == [
        f"{A} (8086:10fb, ixgbe): IOMMU group 1, NUMA node 0, interfaces eth1; behind an IOMMU: bind it to vfio-pci "
        "first",
        f"{B} (8086:10fb, vfio-pci): IOMMU group 2, NUMA node 0, interfaces none; its IOMMU group is not viable: also "
        f"bind or unbind {DISK} (ahci)",
        "0000:05:00.0 (8086:10fb, igb): IOMMU group none, NUMA node none, interfaces none; used by root through sysfs, "
        "with --unbind"]


def test_status_of_vfio_without_an_iommu(machine, capsys):
    bind.command(["vfio", A, B], machine.root)
    (machine.root / "dev/vfio/1").rename(machine.root / "dev/vfio/noiommu-1")
    (machine.path(B) / "iommu_group").unlink()
    capsys.readouterr()
    bind.command(["status"], machine.root)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[1] for line in lines] == [
        "bound to vfio-pci, but there is no IOMMU: unbind it, then it is used by root through sysfs"] * 2


def test_status_of_an_iommu_that_lets_physical_addresses_through(machine, capsys):
    (machine.path(A) / "iommu_group/type").write_text("identity\n")
    bind.command(["status", A], machine.root)
    assert capsys.readouterr().out.endswith("; used by root through sysfs, with --unbind\n")


# ---- registers

def test_registers_of_a_card_are_looked_at_only(tmp_path, capsys):
    machine = FakeMachine(tmp_path)
    path = machine.add(A, driver="ixgbe")
    window = bytearray(0x20000)
    window[8:12] = (0x80080).to_bytes(4, "little")
    window[0x1028:0x102C] = (1 << 25).to_bytes(4, "little")
    window[0x800:0x804] = b"\1\0\0\0"  # EICR, which a look would clear
    (path / "resource0").write_bytes(window)
    registers.command([A], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "STATUS         0x00008  0x00080080 (LINK_UP MASTER_ENABLED)" in lines
    assert "RXDCTL[0]      0x01028  0x02000000 (ENABLE)" in lines and not any("EICR" in line for line in lines)
    registers.command([A, "RXDCTL", "STATUS"], tmp_path)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["STATUS", "RXDCTL[0]"]
    assert (path / "resource0").read_bytes() == window and machine.command(A) == 0


def test_registers_that_cannot_be_seen(tmp_path):
    machine = FakeMachine(tmp_path)
    path = machine.add(A)
    (path / "resource0").write_bytes(b"\xff" * 0x20000)
    with pytest.raises(IxyError, match="the device is gone or its memory space is off"):
        registers.command([A], tmp_path)
    (path / "resource0").write_bytes(bytes(64))
    with pytest.raises(Refused, match="cannot be mapped"):
        registers.command([A], tmp_path)
    machine.add(B, ids=(0x8086, 0x1572))
    with pytest.raises(IxyError, match="no driver for 8086:1572"):
        registers.command([B], tmp_path)


def test_registers_of_a_driver_without_a_table(tmp_path):
    FakeMachine(tmp_path).add(A, ids=(0x1AF4, 0x1041))
    with pytest.raises(Refused, match=f"{A}: the virtio driver has no table of registers"):
        registers.command([A], tmp_path)


def test_registers_of_a_simulated_card(capsys):
    registers.command(["sim", "RXDCTL"])
    assert "(ENABLE)" in capsys.readouterr().out


# ---- the guest, as far as it goes without one

def test_a_console_that_is_lost_does_not_hide_how_the_command_ended(tmp_path, capsys):
    class Ended:
        def text(self, name):
            return f"{name} of the guest"

    guest.keep_console(Ended(), tmp_path)
    assert capsys.readouterr().err == f"the console is lost: {tmp_path}: Is a directory\n"
    guest.keep_console(Ended(), tmp_path / "log")
    assert (tmp_path / "log").read_text() == "console of the guest"


def test_a_machine_without_the_guests_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Refused, match="python -m tools.guest setup"):
        guest.command(["run", "--", "true"])


def test_parts_of_another_recipe_do_not_count(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = guest_parts.cache_folder() / "root"
    (root / "lib/modules/6.1").mkdir(parents=True)
    (root / "recipe").write_text("an older one")
    with pytest.raises(Refused, match="setup"):
        guest_parts.parts()
    (root / "recipe").write_text(guest_parts.RECIPE)
    assert guest_parts.parts().version == "6.1"


def test_cards_have_addresses_and_cables():
    words, addresses = guest.nic_options([("virtio", "/x"), ("igb", None), ("virtio-legacy", None), ("e1000e", "/y")],
                                         iommu=True)
    assert addresses == ["0000:00:10.0", "0000:01:00.0", "0000:00:12.0", "0000:02:00.0"]
    devices = [word for word in words if word.split(",")[0] in ("virtio-net-pci", "igb", "e1000e")]
    assert ["iommu_platform=on" in device for device in devices] == [True, False, False, False]
    assert len({device.split("mac=")[1][:17] for device in devices}) == 4
    assert [word.rpartition("=")[2] for word in words if word.startswith("stream,")] == ["/x", "/y"]
