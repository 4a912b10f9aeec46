"""The benchmark itself: its NIC model, the rivals in C, how figures are made, and that README.md's are the latest."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ixy_numba.core.errors import IxyError, UsageError
from ixy_numba.core.jit import INTERPRETED
from ixy_numba.core.mmio import MACHINE

if INTERPRETED or MACHINE != "x86_64":
    pytest.skip("the benchmark times compiled code on x86-64", allow_module_level=True)

from bench import __main__ as cli
from bench import budget, common, contest, counting, latency, marks, nic, ours, plots, readme, rivals, safety, size

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = [name for name in rivals.COMPILERS if shutil.which(name)]
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C compiler")
MACHINE_INFO = {"cpu": "a CPU", "cpus": 2, "tsc_ghz": 2.5, "kernel": "6", "compilers": {"gcc": "gcc 12"},
                "c_flags": "-O3", "python": "3", "numba": "1", "llvmlite": "1", "numpy": "1",
                "noise": {"loop_median_over_min": 1.0, "loop_p99_over_min": 1.0, "loop_max_over_min": 1.0,
                          "steal_percent": 0.0, "load": 0.0}}


@pytest.fixture(scope="module")
def eviction():
    return nic.new_eviction([])


@pytest.fixture(scope="module")
def rival(eviction):
    if not COMPILERS:
        pytest.skip("no C compiler")
    return contest.Contestant(rivals.Rival("same_design", COMPILERS[0]), eviction)


# ---- contestants forward correctly, and the model would notice if they did not


@needs_compiler
@pytest.mark.parametrize("handler", nic.EFFECTS)
@pytest.mark.parametrize("form", rivals.FORMS)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_rivals_forward_correctly(compiler, form, handler, eviction):
    player = contest.Contestant(rivals.Rival(form, compiler, handler), eviction)
    assert [fault for batch in (1, 32, 256) for fault in player.verify(batch)] == []


@pytest.mark.parametrize("form", ours.FORMS)
def test_ours_forwards_correctly(form, eviction):
    player = contest.Contestant(ours.Ours(form), eviction)
    assert [fault for batch in (1, 32, 256) for fault in player.verify(batch)] == []


@pytest.mark.parametrize("form", ["fused", "in_place"])
@pytest.mark.parametrize("handler", ["mac_swap", "udp_filter"])
def test_handlers_do_what_the_rivals_do(handler, form, eviction):
    assert contest.Contestant(ours.Ours(form, handler), eviction).verify(32) == []


@needs_compiler
@pytest.mark.parametrize("byte", [1, 12, 47, 51])
def test_a_changed_byte_is_noticed(byte, eviction):
    player = contest.Contestant(rivals.Rival("ixy_style", COMPILERS[0]), eviction)
    player.nic.expected.view(np.uint8)[byte] ^= 1
    assert any("wrong contents" in fault for fault in player.verify(32))


@needs_compiler
def test_packets_that_should_have_been_dropped_are_noticed(eviction):
    player = contest.Contestant(rivals.Rival("ixy_style", COMPILERS[0]), eviction)
    player.nic.drops = 1
    faults = player.verify(32)
    assert any("sent, expected" in fault for fault in faults) and any("wrong contents" in fault for fault in faults)


@needs_compiler
def test_a_lost_buffer_is_noticed(eviction):
    entry = rivals.Rival("same_design", COMPILERS[0])
    player = contest.Contestant(entry, eviction)
    entry.buffers += 1
    assert player.verify(32)[0].endswith(f"{entry.buffers - 1} of {entry.buffers} buffers accounted for")


def test_intact_refuses_reordered_and_shortened_packets(rival):
    model = nic.new_nic(rival.entry.ports)
    buffer = np.zeros(64, np.uint8)
    buffer[:] = np.frombuffer(nic.EFFECTS["touch"], np.uint8)
    buffer[34:38] = np.frombuffer(int(nic.frame_ports(np.uint64(7))).to_bytes(4, "little"), np.uint8)
    buffer[52:60] = np.frombuffer((7).to_bytes(8, "little"), np.uint8)
    at, port = np.uint64(buffer.ctypes.data), model.port[0]
    port.sent = 2

    def intact(length, last):
        port.last = last
        return bool(nic.intact(model, port, at, np.uint64(length)))

    assert intact(60, 6)
    assert not intact(59, 6)
    assert not intact(60, 7), "a packet that was seen before"


def test_fill_stops_at_the_tail(rival):
    """511 of 512 descriptors are the NIC's; the rest of what was asked for is not received."""
    fresh = contest.Contestant(rivals.Rival("same_design", COMPILERS[0]), rival.eviction)
    assert int(nic.fill(fresh.nic, 0, np.uint64(1000))) == nic.RING - 1
    assert int(nic.fill(fresh.nic, 0, np.uint64(1))) == 0


# ---- figures


def samples(cycles, packets=10):
    made = np.zeros(len(cycles), nic.SAMPLE).view(np.recarray)
    made.cycles, made.packets = cycles, packets
    return made


def test_interrupted_rounds_and_the_first_ones_do_not_count():
    found = contest.cycles_per_packet(samples([900, 900, *[120] * 13, 100_000]), 20.0)
    assert found == 10.0


def test_ratios_are_between_runs_of_the_same_turn():
    rows = contest.rows("t", {"ixy_style_gcc": [10.0, 20.0, 40.0], "fused": [5.0, 5.0, 30.0]}, batch_size=1)
    fused = rows[1]
    assert fused["cycles_per_packet"] == 5.0
    assert (fused["min"], fused["ratio_to_ixy_style"], fused["max"]) == (0.25, 0.5, 0.75)
    assert fused["ratio_to_same_design_gcc"] is None


def test_without_a_compiler_there_are_rows_without_ratios(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    rivals.compilers.cache_clear()
    try:
        assert rivals.compilers() == []
    finally:
        rivals.compilers.cache_clear()
    (row,) = contest.rows("t", {"fused": [5.0, 6.0, 7.0]})
    assert row["ratio_to_ixy_style"] is None and row["cycles_per_packet"] == 6.0
    assert any("no C compiler" in line for line in common.headline({**MACHINE_INFO, "compilers": {}}))


def test_a_source_that_does_not_compile_gives_one_line():
    if not COMPILERS:
        pytest.skip("no C compiler")
    with pytest.raises(IxyError, match="-nonsense") as caught:
        rivals.library("ixy_style", COMPILERS[0], flags=("-nonsense",))
    assert "\n" not in str(caught.value)


def test_every_processor_state_is_measured(rival):
    for state in nic.STATES:
        found = contest.compete([rival], state, 32, 2, contest.clock_cost())
        assert all(cycles > 0 for cycles in found[rival.name])


# ---- latency


def test_latencies_become_percentiles():
    pytest.importorskip("hdrh", reason="hdrhistogram is not installed")
    counts = np.zeros(latency.COUNTED, np.uint32)
    counts[2000], counts[4000], counts[-1] = 980, 19, 1  # at 2 GHz: 1 us, 2 us, and one off the scale
    found = latency.percentiles(counts, 20_000_000, 2.0)
    assert found["50"] == pytest.approx(1, rel=2e-3)
    assert found["99"] == pytest.approx(2, rel=2e-3)
    assert found["99.99"] == pytest.approx(10_000, rel=2e-3)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_every_packet_is_timed_once(rival):
    latency.compile_for(rival, 2.5)
    counts, control, share = latency.run(rival, 1, 0.02, 2.5)
    sent = int(rival.nic.port["sent"].sum())
    assert 0 < int(counts.sum()) <= sent  # what is in flight at the end is sent, and not timed
    assert sent - int(counts.sum()) <= 2 * nic.RING
    assert 0 < share <= 1.01 and int(control.longest) >= np.flatnonzero(counts)[0]


def test_an_error_in_a_thread_is_raised():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")

    def fails():
        raise ValueError("as intended")

    with pytest.raises(ValueError, match="as intended"):
        latency.Together((fails,), (lambda: None,))


# ---- counting

DUMP = """desc: Trigger: Client Request: fused|8|64
events: Ir Dr Dw I1mr D1mr D1mw Bc Bcm Bi Bim
ob=???
fn=???
0x1000 0 7 1 0
0x1004 0 7
calls=1 0x2000 0
0x1008 0 99 9 9
ob=/tmp/x/ixy.so
0x1000 0 3
totals: 17 5 4 0 0 0 3 0 1 0
"""


def test_a_callgrind_dump_is_understood(tmp_path):
    path = tmp_path / "out.1"
    path.write_text(DUMP)
    name, (total, lines) = counting._parse(path)
    assert name == "fused|8|64"
    assert total == {"instructions": 17, "loads": 5, "stores": 4, "branches": 4}
    assert lines == {("", 0x1000): 7, ("", 0x1004): 7, ("ixy.so", 0x1000): 3}, "a call's cost is its callee's"


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_instructions_are_told_apart(tmp_path):
    code = bytes.fromhex("4889d8" "4801d8" "4839d8" "c3" "eb00")  # mov, add, cmp, ret, jmp
    (tmp_path / "code::1000").write_bytes(code)
    addresses = {("", 0x1000 + offset) for offset in (0, 3, 6, 9, 10)}
    decoded = counting._disassemble(tmp_path, addresses)
    mix = counting._mix(dict.fromkeys(addresses, 2), decoded)
    assert mix == {"move": 2, "arithmetic": 2, "compare": 2, "stack": 2, "jump": 2}


def test_the_difference_of_two_lengths_is_what_a_packet_costs():
    short, long = ({"instructions": 1000 + 50 * packets} for packets in (64, 192))
    assert counting._per_packet({counting.SHORT: (short, 64), counting.LONG: (long, 192)}) == {"instructions": 50}


def test_the_budget_allows_three_percent():
    allowed = {"fused": {"8": 100.0}}
    assert budget.compare({"fused": {"8": 103.0}}, allowed) == []
    assert len(budget.compare({"fused": {"8": 103.1}}, allowed)) == 1
    assert budget.compare({"new": {"8": 1.0}}, allowed) == ["new at batch 8 has no budget"]


# ---- safety: marks and costs

MARKED = """
import pytest

@pytest.mark.safety("memory_bounds")
@pytest.mark.parametrize("k", range(2))
def test_both_pass(k): pass

@pytest.mark.safety("memory_use_after_free", "packet_bounds")
def test_passes(): pass

@pytest.mark.safety("packet_bounds")
def test_fails(): assert False

@pytest.mark.safety("packet_use_after_free")
def test_skips(): pytest.skip("as intended")

@pytest.mark.safety("integer_overflow")
@pytest.mark.xfail
def test_fails_as_expected(): assert False

def test_of_nothing(): pass
"""


def test_a_mark_needs_all_its_tests_to_pass(tmp_path):
    (tmp_path / "test_it.py").write_text(MARKED)
    given, tests = marks.measure(tmp_path)
    assert tests == {"memory_bounds": {"passed": 2}, "memory_use_after_free": {"passed": 1},
                     "packet_bounds": {"passed": 1, "failed": 1}, "packet_use_after_free": {"skipped": 1},
                     "integer_overflow": {"skipped": 1}}
    assert [name for name, yes in given.items() if yes] == ["memory_bounds", "memory_use_after_free"]
    assert marks.table(given)["ixy_numba (tested)"] == ("✓", "✓", "✗", "✗", "✗")


@pytest.mark.parametrize(("begins", "outcome"), [
    ("import pytest; pytest.skip('no such part', allow_module_level=True)", "skipped"),
    ("import pytest; pytest.importorskip('no_such_module')", "skipped"),
    ("import no_such_module", "failed"),
])
def test_a_file_that_is_not_collected_gives_no_mark(tmp_path, begins, outcome):
    (tmp_path / "test_it.py").write_text(begins + MARKED)
    (tmp_path / "test_other.py").write_text('import pytest\n@pytest.mark.safety("memory_bounds")\ndef test_it(): pass')
    given, tests = marks.measure(tmp_path)
    assert tests["memory_bounds"][outcome] == 1 and not any(given.values())


def test_without_a_test_there_is_no_mark(tmp_path):
    given, tests = marks.measure(tmp_path)
    assert not any(given.values()) and marks.reasons(tests)[0] == "memory_bounds: no test is marked for it"


def test_the_published_table_is_whole():
    assert list(marks.PUBLISHED) == [language for language, *_ in size.PUBLISHED]
    assert sum(row.count("✓") for row in marks.PUBLISHED.values()) == 2 + 1 + 2 * 8 + 1


@pytest.mark.parametrize(("variant", "mode", "left_out"), [
    ("fast", "fast", 0), ("all", "checked", 0), ("packet_bounds", "checked", 4)])
def test_a_variant_keeps_the_protections_that_it_names(variant, mode, left_out):
    found, environment = safety.setting(variant)
    names = environment["IXY_NUMBA_WITHOUT"].split(",")
    assert found == mode and len(list(filter(None, names))) == left_out and variant not in names


def test_protections_are_compared_within_a_turn():
    runs = {("all", "fused"): [12.0, 30.0, 10.0], ("fast", "fused"): [10.0, 20.0, 10.0],
            ("all", "ixy_style_gcc"): [24.0, 60.0, 40.0]}
    assert safety._figures(runs, "all", "fused") == {
        "cycles_per_packet": 12.0, "cycles_per_packet_fast": 10.0, "ratio_to_fast": 1.2, "ratio_to_ixy_style": 0.5}
    without = {key: values for key, values in runs.items() if key[1] == "fused"}
    assert safety._figures(without, "all", "fused")["ratio_to_ixy_style"] is None


def safety_result(ratio):
    cost = [{"path": path, "protection": protection, "batch_size": batch, "cycles_per_packet": 10.0,
             "cycles_per_packet_fast": 9.0, "ratio_to_fast": ratio, "ratio_to_ixy_style": ratio,
             "instructions_per_packet": None, "instructions_per_packet_fast": None}
            for path in ours.FORMS for protection in safety.VARIANTS[1:] for batch in safety.BATCH_SIZES]
    return {"marks": dict.fromkeys(marks.PROTECTIONS, True), "cost": cost,
            "tests": dict.fromkeys(marks.PROTECTIONS, {"passed": 3}),
            "handlers": [{**cost[0], "handler": "mac_swap", "batch_size": 32}]}


def test_the_safety_figure_says_what_was_measured(tmp_path, monkeypatch):
    (tmp_path / "s.json").write_text(common.as_json(result("2024-01-01", []) | safety_result(1.125)))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    made = readme.render("<!-- bench:safety -->\n<!-- /bench -->", readme.results())
    assert "| **ixy_numba (tested)** | ✓ | ✓ | ✓ | ✓ | ✓ |" in made and "| C (published) | ✗ | ✗ | ✗ | ✗ | ✗ |" in made
    assert made.count("1.12") == 3 * (1 + len(safety.VARIANTS[1:]))


def test_targets_are_met_or_missed():
    assert [safety.verdict(figure, limit) for _, figure, limit in safety.targets(safety_result(0.2))] == ["met"] * 6
    verdicts = [safety.verdict(figure, limit) for _, figure, limit in safety.targets(safety_result(1.25))]
    assert verdicts == ["missed"] * 5 + ["met"]
    assert any(line.endswith("target 0.33: not measured") for line in safety.show(safety_result(0.2) | {
        "cost": [{**row, "ratio_to_ixy_style": None} for row in safety_result(0.2)["cost"]]}))
    assert "packet_bounds: 3 tests passed" in safety.show(safety_result(0.2))


def test_a_variant_takes_turns_with_the_others(monkeypatch):
    with common.Worker("safety", *safety.setting("fast")) as fast:
        found = fast.ask(handler="touch", forms=["fused"], batch_size=32)
        with pytest.raises(IxyError, match="safety, fast mode: "):
            fast.ask(handler="touch", forms=["nonsense"], batch_size=32)
    assert set(found) == {"fused"} | {"ixy_style_gcc"} & {f"ixy_style_{name}" for name in COMPILERS}
    assert all(cycles > 0 for cycles in found.values())


def test_a_worker_that_dies_is_one_line():
    with common.Worker("no_such_table", "fast") as worker, pytest.raises(IxyError, match="ended with code 1"):
        worker.ask()


# ---- size


def test_lines_of_code_are_counted_as_cloc_counts_them():
    statement = 'x = (1,\n\n     2)  # three lines, one of them blank\ny = """a\nb"""\n'
    assert size.lines_of_code(f'"""Docstring\nof two lines."""\n\n# comment\n{statement}') == 4
    rows = {row["variant"]: row for row in size.measure(quick=True)}
    assert rows["total"]["lines"] == sum(rows[part]["lines"] for part in size.PARTS)
    if rows["total"]["cloc"] is None:
        pytest.skip("cloc is not installed: only the sum was checked")
    assert rows["total"]["cloc"] == pytest.approx(rows["total"]["lines"], rel=0.01)


def test_all_that_the_forwarder_loads_is_counted():
    code = ("import sys, ixy_numba.fwd, ixy_numba.drivers.ixgbe; "
            "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('ixy_numba')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {str(Path(path).relative_to(ROOT)) for path in done.stdout.split()}
    counted = {name for names in [*size.PARTS.values(), *size.EXTRAS.values()] for name in names}
    assert loaded - counted == {size.CONSTANTS}
    assert all((ROOT / name).exists() for name in counted)


def test_published_figures_are_whole():
    lines = plots.PUBLISHED.read_text().splitlines()
    assert lines[0] == "cpu_ghz,language,batch_size,mpps" and len(lines) == 180
    assert len(size.PUBLISHED) == 10 and len(gzip.compress(b"")) > 0


# ---- the command


def run(*words, environment=None):
    return subprocess.run([sys.executable, "-m", "bench", *words], capture_output=True, text=True, cwd=ROOT,
                          timeout=300, env={**os.environ, **(environment or {})})


@pytest.mark.parametrize(("words", "code", "said"), [
    ((), 2, "TABLE"),
    (("nonsense",), 2, "invalid choice"),
    (("size", "--json", "/nonexistent/file"), 2, "name a file that can be written"),
    (("size", "--plot", "x.png"), 2, "has no plot"),
])
def test_wrong_use_gives_one_line(words, code, said):
    done = run(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-1]


def test_without_the_compiler_of_numba_it_says_so():
    done = run("size", environment={"NUMBA_DISABLE_JIT": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "NUMBA_DISABLE_JIT" in done.stderr


def test_a_table_writes_json(tmp_path):
    done = run("size", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["rows"][0]["table"] == "size" and result["commit"] and result["machine"]["numba"]


@pytest.mark.parametrize(("module", "function"), [("hdrh", latency.require), ("matplotlib", plots.require)])
def test_a_missing_extra_is_named(monkeypatch, module, function):
    monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(common.Unavailable, match=r"ixy_numba\[bench\]"):
        function()


def test_all_leaves_out_what_the_machine_cannot_do(monkeypatch, capsys):
    class Table:
        @staticmethod
        def measure(quick):
            raise common.Unavailable("events: needs valgrind")

    monkeypatch.setattr(cli, "TABLES", {"events": "…"})
    monkeypatch.setitem(sys.modules, "bench.events", Table)
    assert cli.main(["all"]) == 0
    assert "needs valgrind; the table is left out" in capsys.readouterr().out
    assert cli.main(["events"]) == 1
    assert capsys.readouterr().err == "error: events: needs valgrind\n"


# ---- plots and README

THROUGHPUT = [{"table": "throughput", "variant": name, "state": state, "batch_size": batch, "cycles_per_packet": 10.0,
               "ratio_to_ixy_style": 0.5, "ratio_to_same_design_gcc": 1.0, "min": 0.4, "max": 0.6}
              for name in ("fused", "ixy_style_gcc") for state in nic.STATES for batch in (8, 32)]


def result(date, rows):
    return {"machine": MACHINE_INFO, "commit": "abc+", "date": date, "quick": False, "rows": rows}


@pytest.mark.parametrize("name", plots.FIGURES)
def test_figures_are_drawn(name, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [*THROUGHPUT, {"table": "latency", "variant": "fused", "offered_mpps": 1, "rate_share": 1.0,
                          "us": {**{f"{p:g}": 1.0 for p in latency.PERCENTILES}, "max": 2.0}}]
    plots.draw(name, rows, MACHINE_INFO, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="png"):
        plots.draw(name, rows, MACHINE_INFO, tmp_path / "x.nonsense")


def test_figures_replace_what_stands_between_the_markers(tmp_path, monkeypatch):
    older = [{**row, "cycles_per_packet": 77.0} for row in THROUGHPUT]
    for name, date, rows in (("b", "2024-01-01", older), ("a", "2024-02-01", THROUGHPUT)):
        (tmp_path / f"{name}.json").write_text(common.as_json(result(date, rows)))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = "before\n<!-- bench:throughput -->\nold\n<!-- /bench -->\nafter\n"
    made = readme.render(text, readme.results())
    assert "old" not in made and "10.0 (x 0.50)" in made and "77.0" not in made
    assert made.startswith("before\n") and made.endswith("after\n")
    assert readme.render(made, readme.results()) == made
    with pytest.raises(IxyError, match="no figure is named 'nonsense'"):
        readme.render(text.replace("throughput", "nonsense"), readme.results())
    with pytest.raises(IxyError, match="python -m bench events"):
        readme.render(text.replace("throughput", "events"), readme.results())


def test_the_readme_shows_the_latest_results():
    text = readme.README.read_text()
    assert readme.MARKED.search(text), "README.md has no figures"
    assert readme.render(text, readme.results()) == text, "run: python -m bench readme"
