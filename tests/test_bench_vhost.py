"""The vhost table: which windows count, ratios within rounds, what it says. The windows themselves need DPDK (CI)."""

import pytest

from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.mmio import MACHINE

if INTERPRETED or MACHINE != "x86_64":
    pytest.skip("the benchmark times compiled code on x86-64", allow_module_level=True)

from bench import common, readme, testpmd, vhost

SECONDS, GHZ = 0.1, 2.0


def windows(*cycles_per_packet, waited=()):
    """A window each of these; those whose number is in `waited` had no processor for half of the time."""
    return [vhost.Window(cycles=int(1000 * cost), timed=1000, passes=50, packets=2000, elapsed=int(SECONDS * GHZ * 1e9),
                         waited_s=SECONDS / 2 if k in waited else 0.0) for k, cost in enumerate(cycles_per_packet)]


def table(**changes):
    """The rows of all variants at 20 cycles a packet, but for what `changes` says: {variant: windows of receive}."""
    found = {(work, variant): windows(20, 20, 20, 20) for work in vhost.WORK for variant in (*vhost.OURS, *vhost.RIVALS)
             if vhost.applies(work, variant)}
    found.update({("receive", variant): made for variant, made in changes.items()})
    return vhost.rows(found, SECONDS, GHZ, "4 KiB")


def row_of(rows, variant, work="receive"):
    return next(row for row in rows if (row["variant"], row["work"]) == (variant, work))


def test_ratios_are_between_windows_of_the_same_round():
    row = row_of(table(handler=windows(10, 30, 20, 40), dpdk=windows(20, 40, 40, 40)), "handler")
    assert (row["min"], row["ratio_to_dpdk"], row["max"]) == (0.5, 0.625, 1.0)
    assert (row["cycles_per_packet"], row["packets_per_pass"], row["undisturbed"]) == (25.0, 20.0, 4)
    assert row["mpps"] == pytest.approx(2000 / SECONDS / 1e6)


def test_windows_without_a_processor_do_not_count_on_either_side():
    rows = table(handler=windows(10, 999, 10, 10, waited=[1]), dpdk=windows(20, 20, 5, 20, waited=[2]))
    row = row_of(rows, "handler")
    assert (row["min"], row["max"]) == (0.5, 0.5)
    assert row["cycles_per_packet"] == 10.0 and row["undisturbed"] == 3


def test_too_few_undisturbed_windows_are_said_to_be():
    rows = table(handler=windows(10, 10, 10, 10, waited=[0, 1, 2]))
    assert row_of(rows, "handler")["ratio_to_dpdk"] == 0.5
    assert "the machine's other work" in vhost.show(rows)[-1] and "other work" not in "".join(vhost.show(table()))


def test_verdicts_compare_the_default_with_the_split_ring_and_the_best_of_the_rival():
    rows = table(handler=windows(9, 9, 9, 9), dpdk=windows(10, 10, 10, 10), dpdk_packed=windows(6, 6, 6, 6))
    shown = "\n".join(vhost.show(rows))
    assert "receive: 9.0 cycles, x 0.90 of DPDK's split ring (target 0.9: met), x 1.50 of its best (packed" in shown
    assert "transmit: 20.0 cycles, x 1.00 of DPDK's split ring (target 0.9: missed)" in shown


def test_the_readme_has_a_table_of_it():
    lines = readme.FIGURES["vhost"](table())
    assert lines[0].endswith("| receive | transmit | macswap |") and "4 KiB" in lines[0]
    assert any(line.startswith("| ours: handler (default) | 20.0 (x 1.00, 1.00 to 1.00) | - |") for line in lines)


def test_a_machine_without_dpdk_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vhost.os, "sched_getaffinity", lambda _: {0, 1})
    assert not testpmd.installed()
    with pytest.raises(common.Unavailable, match="needs dpdk-testpmd, gcc, pkg-config; install"):
        vhost.require()
    monkeypatch.setattr(vhost.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(common.Unavailable, match="two processors"):
        vhost.require()
