"""What the documentation shows is what the code is and does."""

import re
import subprocess
import sys
from pathlib import Path

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.utils import RawPcapReader, wrpcap

from ixy_numba.core.registers import Register
from ixy_numba.drivers.ixgbe import regs

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def receive_kernel():
    source = (ROOT / "ixy_numba/drivers/ixgbe/kernels.py").read_text()
    return re.search(r"@kernel\n(def rx_batch\(.*?    return n\n)", source, re.DOTALL).group(1)


def test_readme_shows_the_receive_kernel_as_it_is():
    shown = re.search(r"<!-- kernel -->\n```python\n(.*?)```\n<!-- /kernel -->", README, re.DOTALL).group(1)
    assert shown == receive_kernel()


def test_every_departure_is_listed_and_every_listed_one_is_there():
    marked = {match for path in (ROOT / "ixy_numba").rglob("*.py")
              for match in re.findall(r"# DEVIATION\(([\w-]+)\): \S", path.read_text())}
    listed = set(re.findall(r"^### `([\w-]+)`", (ROOT / "docs/deviations.md").read_text(), re.MULTILINE))
    assert marked == listed and len(marked) >= 7


def test_links_in_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)[#)]", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_registers_of_the_driver_cite_a_section():
    for register in regs.TABLE.values():
        assert isinstance(register, Register) and re.fullmatch(r"\d+(\.\d+)+", register.at), register


def test_the_handler_in_the_readme_runs(tmp_path):
    code = re.search(r"```python\n(from ixy_numba import DROP.*?)```", README, re.DOTALL).group(1)
    frames = [Ether(type=0x0806) / Raw(b"x" * 40), Ether() / IP() / UDP(), Ether() / IP() / TCP()]
    wrpcap(str(tmp_path / "a.pcap"), frames)
    (tmp_path / "app.py").write_text(code)
    subprocess.run([sys.executable, "app.py"], cwd=tmp_path, check=True, timeout=300, env=with_package())
    assert [bytes(f) for f, _ in RawPcapReader(str(tmp_path / "b.pcap"))] == [bytes(f) for f in frames[1:]]


def with_package():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def example(name, *args):
    return subprocess.run([sys.executable, ROOT / "docs/examples" / name, *map(str, args)], text=True, check=True,
                          timeout=300, capture_output=True, env=with_package()).stdout


def test_example_udp_filter(tmp_path):
    def frame(source, port, size, kind=UDP):
        return Ether() / IP(src=source) / kind(sport=9, dport=port) / Raw(b"x" * size)

    frames = [frame("10.0.0.1", 53, 100), frame("10.0.0.2", 53, 7), frame("10.0.0.1", 54, 1), frame("10.0.0.1", 53, 30),
              frame("10.0.0.3", 53, 9, TCP), Ether() / IP(src="10.0.0.9", frag=5, proto=17) / Raw(b"5" * 64)] * 50
    wrpcap(str(tmp_path / "a.pcap"), frames)
    printed = example("udp_filter.py", 53, f"sim:in={tmp_path / 'a.pcap'}", f"sim:out={tmp_path / 'b.pcap'}")
    passed = [bytes(f) for f, _ in RawPcapReader(str(tmp_path / "b.pcap"))]
    assert passed == [bytes(frames[k]) for k in range(300) if k % 6 in (0, 1, 3)]
    assert re.findall(r"^([\d.]+) +(\d+) bytes$", printed, re.MULTILINE) == [
        ("10.0.0.1", str(50 * (142 + 72))), ("10.0.0.2", str(50 * 49))]


def test_example_delay_line_keeps_order_and_loses_nothing(tmp_path):
    frames = [Ether() / IP(id=k) / UDP() / Raw(b"x" * (k % 700)) for k in range(3000)]
    wrpcap(str(tmp_path / "a.pcap"), frames)
    printed = example("delay_line.py", f"sim:in={tmp_path / 'a.pcap'},rate=20000", f"sim:out={tmp_path / 'b.pcap'}")
    assert "delayed 3000 packets by 1.0 ms, dropped 0" in printed
    assert [bytes(f) for f, _ in RawPcapReader(str(tmp_path / "b.pcap"))] == [bytes(f) for f in frames]
