"""`python -m bench` without a GPU: what is registered, bars, comparison, which rows stay."""

import dataclasses
import json
import shlex
import subprocess

import chex
import jax
import pytest

from bench import __main__ as command
from bench import compare, driver, measure, memory, registry, results
from bench.benchmark import Bar, Benchmark, Point, field, matches, select
from bench.steps import decode_step
from bench.steps._ablated import Variant
from bench.steps._model import StepCase, random_like
from bench.tunings import linear as tune_linear
from g4attn_jax import Gemma4Config
from g4attn_jax.ops.gpu import Gpu
from g4attn_jax.ops.linear.launch import MatmulLaunch
from tests.everyday import everyday

BENCHMARKS = [
    *map(registry.benchmark, registry.names()),
    *map(registry.tuning, registry.tuning_names()),
]
COMMITTED = {path.stem: path for path in results.COMMITTED.glob("*.json")}
# Measured before the rows of a group's parts were rows of their own.
OTHER_ROWS = {"speculative"}


def by_name(benchmark):
    return benchmark.name


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=by_name)
def test_points_build(benchmark):
    points = benchmark.points()
    places = [tuple(point.fields.items()) for point in points]
    assert points and len(set(places)) == len(places)
    for fields, subject in points:
        assert set(fields) <= set(benchmark.identity)
        if hasattr(subject, "structs"):
            assert jax.tree.leaves(subject.structs()) and subject.bytes() > 0


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=by_name)
def test_fields_are_declared(benchmark):
    known = {*benchmark.identity, *benchmark.fields}
    assert len(known) == len(benchmark.identity) + len(benchmark.fields)
    for bar in benchmark.bars:
        assert bar.named_fields() <= known and bar.why
        assert {*bar.beside, *bar.where} <= set(benchmark.identity)
    for name, spread in benchmark.watched.items():
        assert {name, *([spread] if isinstance(spread, str) else spread or ())} <= known


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=by_name)
def test_every_bar_is_for_some_point(benchmark):
    points = benchmark.points()
    for bar in benchmark.bars:
        wanted = [bar.where, {**bar.where, **bar.beside}]
        for where in wanted:
            assert any(all(_is(p.fields[n], v) for n, v in where.items()) for p in points), bar


def _is(value, wanted):
    return value == wanted or (isinstance(wanted, tuple | range) and value in wanted)


@pytest.mark.parametrize("name", sorted(COMMITTED.keys() - OTHER_ROWS))
def test_committed_rows_are_as_declared(name):
    benchmark = registry.benchmark(name)
    head, rows = results.read(COMMITTED[name])
    assert head["gpu"] == "NVIDIA H200" and rows
    for row in rows:
        assert set(benchmark.identity) <= set(row)
        assert set(row) <= {*benchmark.identity, *benchmark.fields, benchmark.rate}
    if not name.startswith("tune_"):
        points = [
            tuple(point.fields[n] for n in benchmark.identity) for point in benchmark.points()
        ]
        measured = [tuple(row[n] for n in benchmark.identity) for row in rows]
        assert measured == [point for point in points if point in measured]
        assert len(measured) == len(points) or name == "decode_step"  # see bench/README.md
    assert compare.compare_files(COMMITTED[name], COMMITTED[name]) == 0
    driver.judge(benchmark, rows)


@pytest.mark.parametrize("name", sorted(COMMITTED.keys() - OTHER_ROWS))
def test_plot(name, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    benchmark = registry.benchmark(name)
    if benchmark.plot is not None:
        head, rows = results.read(COMMITTED[name])
        benchmark.plot(rows, head, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size


def test_plot_of_a_group(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    benchmark = registry.benchmark("speculative")
    rows = [point.fields | {"ms": 2.0, "tokens_per_s": 3.0} for point in benchmark.points()]
    benchmark.plot(rows, {"gpu": "a GPU", "jax": "0"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_list(capsys):
    assert command.main(["list"]) == 0
    listed = capsys.readouterr().out
    for benchmark in BENCHMARKS:
        assert benchmark.about in listed
    # The number is in bench/README.md too.
    readme = (results.COMMITTED.parents[1] / "README.md").read_text()
    assert f"The\n  committed rows miss {listed.count('bar missed')} bars" in readme


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "nothing"], ["nothing", "decode_attention", "decode_step"]),
        (["tune", "decode_step"], ["decode_step", "linear"]),
        (["run", "linear", "--where", "tokens"], ["tokens", "FIELD=VALUE"]),
        (["run", "linear", "--where", "weight=up"], ["weight", "up", "sliding qkv"]),
        (["run", "linear", "--where", "size=1"], ["size"]),
        (["compare", "nothing.json", "nothing.json"], ["nothing.json"]),
    ],
)
def test_refusals(arguments, named, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in named), said


# A benchmark of its own, whose rows are made here.
ROWS = [{"tokens": tokens, "form": form} for tokens in (1, 8) for form in ("a", "b")]
NAMES = ("ours_us", "ours_p10_p90_us", "xla_us", "launches")


def made(bars=(), times=None):
    """A benchmark of four points; `times` are those of ours in order."""

    def measured(points, rate):
        for number, point in enumerate(points):
            us = 10.0 if times is None else times[number]
            yield point.fields | dict(zip(NAMES, (us, [us - 1, us + 1], 40.0, 1), strict=True))

    return Benchmark(
        name="made",
        about="made by a test",
        identity=("tokens", "form"),
        fields=NAMES,
        points=lambda: [Point(row) for row in ROWS],
        measure=measured,
        watched={"ours_us": "ours_p10_p90_us", "xla_us": None, "launches": None},
        bars=bars,
        rate="read_gbps",
    )


@pytest.fixture
def machine(monkeypatch):
    """Description of the machine, which tests may change."""
    said = {"gpu": "a GPU", "driver": "1", "jax": "0"}
    monkeypatch.setattr(results, "machine", lambda: dict(said))
    monkeypatch.setitem(measure.RATES, "read_gbps", lambda: 1234.56)
    return said


def test_run_writes_rows_and_head(machine, tmp_path, capsys):
    bar = Bar(of="xla_us", over="ours_us", where={"tokens": 8}, least=5, why="for a reason")
    driver.run(made([bar]), tmp_path, "python -m bench run made", {})
    head, rows = results.read(tmp_path / "made.json")
    assert head == machine | {"benchmark": "made", "command": "python -m bench run made"}
    assert [{name: row[name] for name in ("tokens", "form")} for row in rows] == ROWS
    assert all(row["read_gbps"] == 1234.6 for row in rows)
    said = capsys.readouterr().out
    assert said.count("bar missed") == 2 and "for a reason" in said and "2 miss a bar" in said


def test_rows_that_are_not_measured_stay(machine, tmp_path):
    path = tmp_path / "made.json"
    driver.run(made(), tmp_path, "first", {})
    driver.run(made(times=[20.0, 30.0]), tmp_path, "second", {"form": ["b"]})
    _, rows = results.read(path)
    assert [(row["tokens"], row["form"], row["ours_us"]) for row in rows] == [
        (1, "a", 10.0),
        (1, "b", 20.0),
        (8, "a", 10.0),
        (8, "b", 30.0),
    ]
    machine["driver"] = "2"
    with pytest.raises(ValueError, match=r"3 rows.* driver"):
        driver.run(made(), tmp_path, "third", {"form": ["a"], "tokens": ["1"]})
    driver.run(made(), tmp_path, "fourth", {})
    assert results.read(path)[0]["driver"] == "2"


def test_rows_of_no_point_are_not_lost_silently(machine, tmp_path, capsys):
    path = tmp_path / "made.json"
    others = [{"tokens": 2, "form": "a"}, {"size": 1}]
    results.write(path, machine, others)
    with pytest.raises(ValueError, match=r"made\.json has 2 rows of no point.*--out"):
        driver.run(made(), tmp_path, "", {"form": ["a"]})
    assert results.read(path)[1] == others
    driver.run(made(), tmp_path, "", {})
    assert len(results.read(path)[1]) == len(ROWS)
    assert "2 rows of no point" in capsys.readouterr().out


def test_the_head_says_what_was_selected(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(command.registry, "benchmark", lambda name: made())
    arguments = ["run", "made", "--where", "form=a,b", "tokens=1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    head, rows = results.read(tmp_path / "made.json")
    assert head["command"] == shlex.join(["python", "-m", "bench", *arguments])
    assert [row["tokens"] for row in rows] == [1, 1]


@pytest.mark.parametrize(
    ("statuses", "status"), [([0, 0], 0), ([0, 2], 1), ([-9, 0], 1), ([0, -9], 1)]
)
def test_a_process_that_fails_is_told(statuses, status, monkeypatch):
    left = list(statuses)
    ended = lambda words: subprocess.CompletedProcess(words, left.pop(0))  # noqa: E731
    monkeypatch.setattr(subprocess, "run", ended)
    assert command.main(["run", "linear", "decode_step"]) == status
    assert not left  # all have run


def test_machine_without_a_gpu():
    if jax.devices()[0].platform == "cpu":
        assert results.machine() == {"gpu": "cpu", "driver": "none", "jax": jax.__version__}


def test_where_selects_by_text():
    points = [Point(row) for row in ROWS]
    assert len(select(points, {"tokens": ["1"]})) == 2
    assert len(select(points, {"tokens": ["1", "8"], "form": ["b"]})) == 2
    with pytest.raises(ValueError, match=r"tokens.*2.*accepted: 1, 8"):
        select(points, {"tokens": ["2"]})


def test_bars():
    rows = [
        {"form": "a", "us": 10, "limit": 9, "group": {"ms": 4}},
        {"form": "b", "us": 20, "limit": 9, "group": {"ms": None}},
    ]

    def missed(**bar):
        bar = Bar(why="", **bar)
        return ["x" if bar.missed(row, rows, ["form"]) else "" for row in rows]

    assert missed(of="us", most=10) == ["", "x"]
    assert missed(of="limit", over="us", least=0.5) == ["", "x"]
    assert missed(of="us", over="us", beside={"form": "a"}, most=1.5) == ["", "x"]
    assert missed(of="us", over="us", beside={"form": "c"}, most=0) == ["", ""]
    assert missed(of="us", where={"form": ("a", "c")}, most=0) == ["x", ""]
    assert missed(of="group.ms", most=3) == ["x", ""]
    with pytest.raises(ValueError, match="least"):
        Bar(of="us", why="")


@pytest.fixture
def compared(machine, tmp_path, monkeypatch, capsys):
    """Compares a run with another, whose rows have other fields; (exit status, what is said)."""
    benchmark = made()
    monkeypatch.setattr(compare.registry, "benchmark", lambda name: {"made": benchmark}[name])

    def run(*changes):
        driver.run(benchmark, tmp_path, "", {})
        before = tmp_path / "before.json"
        (tmp_path / "made.json").rename(before)
        head, rows = results.read(before)
        after = tmp_path / "after.json"
        for row, change in zip(rows, changes, strict=False):
            row |= change
        results.write(after, head, rows)
        capsys.readouterr()
        return command.main(["compare", str(before), str(after)]), capsys.readouterr().out

    return run


def test_compare_nothing_changed(compared):
    status, said = compared({"ours_us": 10.2}, {"xla_us": 41.0})
    assert status == 0 and "4 rows in both" in said and "0 times slower, 0 times faster" in said


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        # The 10th and 90th percentiles of 10 us are 9 and 11.
        ({"ours_us": 11.5, "ours_p10_p90_us": [10.9, 12]}, 0, ["0 times slower"]),
        ({"ours_us": 11.5, "ours_p10_p90_us": [11.1, 12]}, 1, ["slower", "ours_us 10 -> 11.5"]),
        ({"ours_us": 8.5, "ours_p10_p90_us": [8, 8.9]}, 0, ["faster", "ours_us 10 -> 8.5"]),
        # No spread: 3 %.
        ({"ours_us": 10.2, "ours_p10_p90_us": None}, 0, ["0 times slower"]),
        ({"ours_us": 10.4, "ours_p10_p90_us": None}, 1, ["slower", "ours_us 10 -> 10.4"]),
        ({"xla_us": 41.1}, 0, ["0 times slower"]),
        ({"xla_us": 41.3}, 1, ["slower", "tokens=1 form=a", "xla_us 40 -> 41.3"]),
        ({"xla_us": 38.5}, 0, ["faster", "1 times faster"]),
        ({"xla_us": None}, 0, ["0 times slower"]),
        ({"launches": 2}, 1, ["slower", "launches 1 -> 2"]),
        ({"launches": 0}, 0, ["faster", "launches 1 -> 0"]),
    ],
)
def test_compare_says_what_changed(compared, change, status, said):
    actual, output = compared(change)
    assert actual == status
    assert all(text in output for text in said), output


def test_compare_matches_rows_by_identity(compared):
    status, said = compared({"form": "c", "ours_us": 99.0})
    assert status == 0 and "3 rows in both, 1 only in" in said
    status, said = compared(*({"form": "c"},) * 4)
    assert status == 2


def test_compare_refuses_other_files(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"benchmark": "linear", "rows": []}))
    assert command.main(["compare", str(COMMITTED["decode_step"]), str(other)]) == 2
    assert "decode_step" in (said := capsys.readouterr().err) and "linear" in said
    other.write_text(json.dumps([]))
    assert command.main(["compare", str(COMMITTED["linear"]), str(other)]) == 2
    assert "rows" in capsys.readouterr().err


def test_kernel_table():
    kernels = [("fusion_1", 0.25), ("fusion_2", 0.75), ("attend", 0.5), ("attend", 0.7)]
    assert measure.kernel_table(kernels, steps=2) == [
        {"name": "attend", "count": 1.0, "us": 600.0},
        {"name": "fusion", "count": 1.0, "us": 500.0},
    ]


def test_launches_of_matmuls_are_among_the_fastest_that_were_measured():
    """By the committed times of an H200, of launches that are among those measured.

    They take at most 3 % longer than XLA's matmul, but E4B's per-layer inputs of one token, which
    take 4.5 % longer. They take at most 5 % longer than the fastest launch with no
    more partial sums, if they take 3 us or more: below, starting a launch is most of its time.
    """
    _, rows = results.read(COMMITTED["tune_linear"])
    gpu, num_judged = Gpu(9.0, 132, 232448), 0
    for point in registry.tuning("linear").points():
        times = {}
        for row in rows:
            if matches(row, point.fields):
                launch = MatmulLaunch(*(row[name] for name in MatmulLaunch._fields))
                times[launch if launch.block_k else None, row["partial_sums"]] = row["us"]
        chosen = tune_linear.chosen(point.subject, gpu)
        if chosen not in times or not tune_linear.takes_kernel(point.subject, gpu):
            continue
        num_judged += 1
        us, place = times[chosen], [point.fields[name] for name in ("model", "weight", "tokens")]
        most = 1.05 if place == ["gemma-4-e4b", "per-layer inputs", 1] else 1.03
        assert us <= most * times.get((None, 1), us), point.fields
        fastest = min(us for (launch, count), us in times.items() if launch and count <= chosen[1])
        assert us <= 1.05 * fastest or us < 3, point.fields
    assert num_judged > 100


def test_fields_of_nested_objects():
    assert field({"a": {"b": 1}}, "a.b") == 1
    assert field({"a": None}, "a.b") is None


def test_the_readme_has_the_table_of_memory():
    assert memory.table() in (results.COMMITTED.parents[2] / "README.md").read_text()


def test_memory_of_a_card():
    free = 0.9 * 80 * 2**30 - memory.weight_bytes("31b")
    count = memory.sequences("31b", 80, 8192)
    assert count * memory.cache_bytes("31b", 8192) <= free
    assert free < (count + 1) * memory.cache_bytes("31b", 8192)
    assert memory.sequences("31b", 48, 8192) == 0


def small(model, layers=2):
    """The config of a model, with few and narrow layers."""
    config = Gemma4Config.preset(model)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 32,
        "global_head_dim": 32,
        "vocab_size": 512,
        "num_hidden_layers": layers,
        "layer_types": config.layer_types[-layers:],
    }
    if config.hidden_size_per_layer_input:
        sizes |= {
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 512,
            "num_kv_shared_layers": 0,
        }
    if config.enable_moe_block:
        sizes |= {"num_experts": 16, "top_k_experts": 4, "moe_intermediate_size": 32}
    return dataclasses.replace(config, **sizes)


@everyday()
def test_experts_that_are_chosen():
    """Every token of every layer has its k experts; counting does not change the step."""
    case = StepCase(small("26b-a4b"), Variant.XLA, 3, 64, tokens_per_step=2)
    weights = random_like(case.weights)
    with jax.default_matmul_precision("highest"):
        step, counting_step = case.step(), case.counting_step()
    expected = step(weights, (*case.tokens(8), random_like(case.cache())))
    state, counts = counting_step(weights, (*case.tokens(8), random_like(case.cache())))
    chex.assert_trees_all_close(state, expected, atol=1e-6)
    assert counts.shape == (2, 16) and (counts.sum(axis=1) == 3 * 2 * 4).all()
    assert (counts <= 6).all() and ((counts > 0).sum(axis=1) >= 4).all()


@pytest.mark.parametrize("model", ["e4b", "26b-a4b"])
def test_xla_alone_has_no_kernel(model):
    """Of the whole step, the head and the per-layer inputs included."""
    case = StepCase(small(model), Variant.XLA, 2, 64)

    def step(weights, state):
        return case.next_state(case.merge(weights), state)

    token = jax.ShapeDtypeStruct((2, 1), "int32")
    jaxpr = str(jax.make_jaxpr(step)(case.weights, (token, token, case.cache())))
    assert "dot_general" in jaxpr and "pallas_call" not in jaxpr


def test_limits_of_experts():
    """Reading all experts costs what their weights have more bytes than reading one."""
    config = small("26b-a4b")
    case = StepCase(config, Variant.XLA, 8, 64)
    one_expert = 2 * 3 * config.hidden_size * config.moe_intermediate_size
    more = case.bytes(64, experts=16) - case.bytes(64, experts=1)
    assert more == pytest.approx(config.num_hidden_layers * 15 * one_expert)
    assert case.uniform_experts() == pytest.approx(16 * (1 - 0.75**8))
    assert case.bytes(64) == pytest.approx(case.bytes(64, experts=case.uniform_experts()))
    fields = decode_step.limits(case, 4000, 5.5)
    assert fields["limit_ms"] <= fields["uniform_limit_ms"] and fields["experts"] == 5.5
    assert decode_step.limits(case, 4000, None).keys() == {"limit_ms"}


def test_random_numbers_of_one_shape_differ():
    x, y, scale = random_like([jax.ShapeDtypeStruct(s, "bfloat16") for s in ((4, 8), (4, 8), (8,))])
    assert (x != y).any() and (scale == 1).all()


def test_plot_of_steps(tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    benchmark = registry.benchmark("decode_step")
    rows = [point.fields | {"limit_ms": 1.0, "step_ms": 2.0} for point in benchmark.points()]
    benchmark.plot(rows, {"gpu": "a GPU", "jax": "0"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


@everyday()
@pytest.mark.parametrize("model", decode_step.MODELS)
def test_bytes_of_a_step(model):
    """Limits of the committed results were computed from these bytes."""
    _, rows = results.read(COMMITTED["decode_step"])
    for row in rows:
        if row["model"] == model and row["variant"] in "af" and row["batch"] in (1, 32):
            variant = next(v for v in Variant if v.letter == row["variant"])
            case = StepCase(
                Gemma4Config.preset(model),
                variant,
                row["batch"],
                8192,
                tokens_per_step=row["tokens"],
            )
            for name, experts in (("limit_ms", row.get("experts")), ("uniform_limit_ms", None)):
                if name in row:
                    limit = case.bytes(8192, experts) / row["read_gbps"] / 1e6
                    assert limit == pytest.approx(row[name], rel=1e-4, abs=6e-4)


@pytest.mark.parametrize(
    "name", ["decode_attention", "qkv_rms_norm", "qkv_norm_rope_write", "grouped_matmul", "linear"]
)
def test_bytes_of_cases(name):
    """Limits of the committed results were computed from these bytes."""
    benchmark = registry.benchmark(name)
    head, rows = results.read(COMMITTED[name])
    for row, point in zip(rows, benchmark.points(), strict=True):
        limit = point.subject.bytes() / head[benchmark.rate] / 1e3
        # Of experts, seeds touch a few more or fewer; of the largest norms, scales are not counted.
        assert limit == pytest.approx(row["limit_us"], rel=5e-3, abs=2e-3), row
