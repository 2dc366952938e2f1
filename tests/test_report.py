"""The report layer: report.json, the summary, the progress lines, the figures and the page, without a browser."""

import dataclasses
import io
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lowprec.errors import ConfigError
from lowprec.formats.schemes import SCHEMES
from lowprec.records import Budget
from lowprec.report import RunProgress, print_summary, report_from_json, report_html, report_json
from lowprec.report import numbers as n
from lowprec.report.palette import in_order, look_of
from lowprec.report.svg import Axis, tag
from lowprec.results import CheckedPair, ParityResult, StruckOut
from report_factory import make_cost, make_loss, make_report

VOID = {"meta", "link", "br", "img", "input", "hr"}

# What issue and users may rely on: a field of report.json and the type of its value.
FIELDS = {
    "model": str,
    "objective": str,
    "verdict": str,
    "unread_data": bool,
    "reused": bool,
    "schema_version": int,
    "loss.metric": str,
    "loss.relative": float,
    "loss.lower": float,
    "loss.upper": float,
    "loss.confidence": float,
    "loss.units": int,
    "loss.tokens": int,
    "loss.kl_nats": float,
    "loss.top1_agreement": float,
    "loss.per_source": list,
    "cost.workload": dict,
    "cost.origin": str,
    "cost.before": float,
    "cost.after": float,
    "cost.reduction_predicted": float,
    "cost.reduction_measured": float,
    "cost.effective_bits": float,
    "cost.weight_bytes_before": int,
    "cost.weight_bytes_after": int,
    "cost.decode_tokens_per_s_before": float,
    "cost.decode_tokens_per_s_after": float,
    "cost.prefill_tokens_per_s_before": float,
    "cost.prefill_tokens_per_s_after": float,
    "parity.codes_equal": bool,
    "parity.max_layer_error": float,
    "parity.kl_nats": float,
    "parity.noise_kl_nats": float,
    "parity.runtime_kl_nats": float,
    "sensitivity.spearman": float,
    "sensitivity.spearman_within": dict,
    "sensitivity.predicted_kl_nats": float,
    "sensitivity.measured_kl_nats": float,
    "schemes": dict,
    "unquantised": list,
    "environment": dict,
    "seconds": dict,
    "plan": dict,
    "groups": list,
    "frontier": list,
    "rounds": list,
    "struck_out": list,
}


@pytest.mark.parametrize("field", FIELDS)
def test_json_has_the_field(field):
    value = json.loads(report_json(make_report()))
    for name in field.split("."):
        value = value[name]
    assert type(value) is FIELDS[field]


def test_json_loses_no_field_of_the_record():
    report = make_report()
    assert set(json.loads(report_json(report))) == {f.name for f in dataclasses.fields(report)}


def test_json_names_schemes_and_correlations():
    data = json.loads(report_json(make_report()))
    assert set(data["schemes"]) == {"w4a16-g64", "w8a8-int8", "bf16"}
    assert all(set(share) == {"groups", "parameters"} for share in data["schemes"].values())
    assert data["sensitivity"]["spearman_within"]["int4"] == 0.941
    assert data["frontier"][0]["scheme_shares"]["bf16"] > 0
    assert sum(share["groups"] for share in data["schemes"].values()) == len(data["groups"])


def test_json_is_canonical_and_comes_back():
    text = report_json(make_report())
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert report_json(report_from_json(text)) == text
    assert report_from_json(text).groups == make_report().groups


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_what_is_no_number_and_names_it(value):
    with pytest.raises(ValueError, match=r"loss\.upper is (nan|inf)"):
        report_json(make_report(loss=make_loss(upper=value)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schemes": 3}', '{"schemes": {}, "sensitivity": {}}'])
def test_a_file_that_is_no_report_is_refused(text):
    with pytest.raises(ConfigError, match="calibrate again"):
        report_from_json(text)


def test_another_schema_version_is_refused():
    text = report_json(make_report()).replace('"schema_version": 1', '"schema_version": 99')
    with pytest.raises(ConfigError, match="99"):
        report_from_json(text)


def printed(report, width=80, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    print_summary(report, console, report_path="out/report.html")
    return console.file.getvalue()


def test_summary_says_everything_in_80_columns_without_colour():
    text = printed(make_report())
    flat = re.sub(r"\s+", " ", text)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for piece in (
        "WITHIN BUDGET",
        "is at most the budget of 5 %",
        "+2.87 % [+2.41 %, +3.34 %], budget 5 %",
        "3.01 s → 1.27 s measured; reduction 57.9 % measured, 60.4 % predicted",
        "48.2 → 122 tokens/s (2.52×)",
        "1,545 → 2,380 tokens/s",
        "269 MB → 129 MB (−52.2 %), 7.41 bits",
        "holds: codes equal",
        "w4a16-g64",
        "33.8 %",
        "slowest: calibrate 2 min 29 s, solve 1 min 36 s",
        "worst source python-topics +3.42 %",
        "out/artefact",
        "out/report.html",
    ):
        assert piece in flat


def test_summary_colours_repeat_the_words():
    text = printed(make_report(verdict="over"), force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[1;31mOVER BUDGET", text)


def test_summary_survives_ascii_and_markup():
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_summary(make_report(model="café [bold]model[/bold]"), console)
    console.file.flush()
    text = raw.getvalue().decode("ascii")
    assert "[bold]model[/bold]" in text
    assert "3.01 s -> 1.27 s" in text
    assert "####" in text


def test_summary_does_not_hide_failures():
    parity = ParityResult(
        codes_equal=False, max_layer_error=3.0, kl_nats=1.0, noise_kl_nats=1e-3, runtime_kl_nats=1.0, plain_kl_nats=None
    )
    report = make_report(parity=parity, reused=True, unread_data=False, cost=make_cost(reduction_measured=None))
    flat = re.sub(r"\s+", " ", printed(report))
    assert "FAILS: codes DIFFERENT" in flat
    assert "read by an earlier run" in flat
    assert "reduction not measured" in flat


def test_long_paths_are_not_wrapped():
    path = "/data/" + "x" * 120
    assert f"{path}\n" in printed(make_report(artefact=path))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_progress_in_a_pipe_prints_a_line_per_step():
    console, clock = Console(file=io.StringIO(), width=80), Clock()
    with RunProgress(console, clock=clock) as progress:
        with progress.step("calibrate", 30, "blocks") as step:
            for _ in range(30):
                step.advance()
            clock.now += 12.25
        for spent in (1.0, 2.0):
            with progress.step("verify") as step:
                step.report(2, 2)
                clock.now += spent
        progress.skip("cost", "cost.json is there")
    lines = console.file.getvalue().splitlines()
    assert [line.split() for line in lines] == [
        ["calibrate", "30/30", "blocks", "12", "s"],
        ["verify", "2/2", "1.0", "s"],
        ["verify", "2/2", "2.0", "s"],
        ["cost", "skipped:", "cost.json", "is", "there"],
    ]
    assert progress.seconds == {"calibrate": 12.25, "verify": 3.0, "cost": 0.0}
    assert list(progress.seconds) == ["calibrate", "verify", "cost"]


def test_progress_says_that_a_step_failed_and_lets_the_error_through():
    console, clock = Console(file=io.StringIO(), width=80), Clock()
    progress = RunProgress(console, clock=clock)

    def run():
        with progress, progress.step("solve", 4, "groups") as step:
            step.advance()
            clock.now += 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert console.file.getvalue().split() == ["solve", "1/4", "groups", "failed", "after", "5.0", "s"]
    assert progress.seconds == {"solve": 5.0}


def test_progress_on_a_terminal_shows_bars():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with RunProgress(console) as progress:
        with progress.step("calibrate", 3, "blocks") as step:
            step.advance(3)
        with progress.step("allocate"):
            pass
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "3/3 blocks" in text
    assert re.search(r"allocate\s+━+\s+\d\.\d s", text)


class Page(HTMLParser):
    """Checks nesting as it reads and keeps what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.resources, self.ids, self.headings = [], [], [], [], []
        self.text = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"repeated attribute in {name}"
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.resources.append(value)
            if key == "id":
                self.ids.append(value)
        if name in ("h1", "h2", "h3"):
            self.headings.append(int(name[1]))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


@pytest.fixture(scope="module")
def page_text():
    return report_html(make_report())


def test_page_is_well_formed_and_small(page_text):
    page = Page(page_text)
    assert len(set(page.ids)) == len(page.ids)
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(page.headings))
    assert len(page_text.encode()) < 150_000
    assert len(report_html(make_report(blocks=80)).encode()) < 300_000


def test_page_loads_nothing_and_runs_nothing(page_text):
    page = Page(page_text)
    assert page.resources == []
    assert not re.search(r"@import|url\((?!#hatch\))|https?://", page_text)
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "img", "object", "embed"}


def test_page_shows_every_group_source_step_and_reason(page_text):
    report, text = make_report(), " ".join(Page(page_text).text)
    names = [g.group for g in report.groups] + [s.source for s in report.loss.per_source] + list(report.seconds)
    names += list(report.environment) + [u.reason for u in report.unquantised] + [s.reason for s in report.struck_out]
    names += [d for _, d in report.plan.input_digests] + [s.scheme for s in report.schemes]
    assert [name for name in names if name not in text] == []


def test_cells_have_tooltips_with_scheme_loss_and_cost(page_text):
    titles = re.findall(r"<title>(model\.layers\.\d+\.\w+: [^<]*)</title>", page_text)
    cells = [t for t in titles if " in " not in t]
    assert len(cells) >= 120
    assert all(re.search(r": (w4a16-g64|w8a8-int8|bf16), predicted KL .* nats, cost ", t) for t in cells)


def test_figures_and_tables_are_labelled(page_text):
    page = Page(page_text)
    drawings = [a for name, a in page.tags if name == "svg" and a.get("role") == "img"]
    assert len(drawings) >= 4 + 4 + 1
    assert all(a.get("aria-label") for a in drawings)
    assert page_text.count("<table") == page_text.count("<caption>")
    assert all(a.get("scope") in ("col", "row") for name, a in page.tags if name == "th")


def test_values_are_escaped():
    evil = "<script>alert('x')</script>&\""
    report = make_report(model=evil, verdict_reason=evil, environment={evil: evil}, artefact=evil)
    groups = (dataclasses.replace(report.groups[0], group=evil, role=evil, scheme=evil), *report.groups[1:])
    text = report_html(
        dataclasses.replace(report, groups=groups, struck_out=(StruckOut(scheme=evil, n=1, k=1, reason=evil),))
    )
    assert "<script" not in text
    assert "alert" in text
    Page(text)


@pytest.mark.parametrize(
    ("verdict", "words"), [("within", "Within budget"), ("over", "Over budget"), ("inconclusive", "Inconclusive")]
)
def test_each_verdict_has_its_words_and_mark(verdict, words):
    text = report_html(make_report(verdict=verdict))
    assert f'<section class="verdict {verdict}"' in text
    assert f"<h2>{words}</h2>" in text


def test_reused_data_is_said():
    assert "Held-out data reused" in report_html(make_report(unread_data=False, reused=True))
    assert "Held-out data reused" not in report_html(make_report())


def test_sparse_reports_render():
    report = make_report()
    bare = dataclasses.replace(
        report,
        groups=tuple(dataclasses.replace(g, block=None) for g in report.groups[:3]),
        frontier=(),
        rounds=(),
        unquantised=(),
        struck_out=(),
        environment={},
        seconds={},
        schemes=(),
        plan=dataclasses.replace(report.plan, budget=Budget(metric="kl", limit=0.1, kind="absolute")),
        sensitivity=dataclasses.replace(report.sensitivity, pairs=(), measured_kl_nats=0.0, spearman_within=()),
        loss=make_loss(
            metric="kl", kl_nats=None, top1_agreement=None, perplexity_before=None, perplexity_after=None, per_source=()
        ),
        cost=make_cost(
            unit="bytes",
            before=269e6,
            after=129e6,
            reduction_measured=None,
            decode_tokens_per_s_before=None,
            prefill_tokens_per_s_before=None,
        ),
    )
    text = report_html(bare)
    Page(text)
    assert "AutoModel.from_pretrained" in text
    assert "it was not measured end to end" in text
    assert "269 MB" in re.sub(r"\s+", " ", printed(bare))


def test_the_ladder_is_shown_where_there_is_one(page_text):
    report = make_report()
    text, said = " ".join(Page(page_text).text), " ".join(printed(report).split())
    assert [rung.name for rung in report.ladder.rungs if rung.name not in text] == []
    assert "7 rungs in 8.29 bits a weight: the lowest takes 71 % of the top's time" in n.plain(text)
    assert 'server = lowprec.serve("out", ttft_s' in text
    assert re.search(r"7 rungs, INT4 → INT8: KL 0\.210? → 0\.0040* nats", said)
    without = dataclasses.replace(report, ladder=None)
    assert "lowprec.serve" not in report_html(without)
    assert "rungs" not in printed(without)
    lossless = tuple(dataclasses.replace(r, loss_nats=0.0, loss_lower=0.0, loss_upper=0.0) for r in report.ladder.rungs)
    Page(report_html(dataclasses.replace(report, ladder=dataclasses.replace(report.ladder, rungs=lossless))))


def test_points_that_a_logarithm_cannot_show_are_counted():
    report = make_report()
    pair = CheckedPair(group="g", scheme="bf16", predicted_kl_nats=0.0, measured_kl_nats=-1e-6)
    found = dataclasses.replace(report.sensitivity, pairs=(*report.sensitivity.pairs, pair))
    assert "1 of 25 pairs are not drawn" in report_html(dataclasses.replace(report, sensitivity=found))


def test_the_same_report_is_the_same_page(page_text):
    assert report_html(make_report()) == page_text


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (n.percent(-0.579, sign=True), "−57.9 %"),
        (n.budget_percent(0.005), "0.5 %"),
        (n.part(2.6e-4), "< 0.1 %"),
        (n.part(0.0), "0.0 %"),
        (n.byte_size(269_030_016), "269 MB"),
        (n.byte_size(999_700), "1.00 MB"),
        (n.byte_size(12), "12 B"),
        (n.count(134_515_008), "135 M"),
        (n.count(9_999), "9,999"),
        (n.duration(3725), "1 h 2 min"),
        (n.duration(59.7), "1 min 0 s"),
        (n.cost(3_012_000, "us"), "3.01 s"),
        (n.cost(41.25, "us"), "41.2 µs"),
        (n.cost(0.42, "dollars per million output tokens"), "0.420 dollars per million output tokens"),
        (n.significant(1.23e-5), "1.23e−5"),
        (n.significant(0.0405), "0.0405"),
        (n.significant(9.996), "10.0"),
        (n.faster(48, 122), "2.54×"),
        (n.loss(0.0287, "relative"), "+2.87 %"),
        (n.loss(0.0123, "absolute"), "+0.0123"),
    ],
)
def test_numbers_for_people(written, expected):
    assert n.plain(written) == expected


@given(st.floats(-1e12, 1e12), st.integers(2, 4))
def test_significant_is_close_to_the_value(value, digits):
    read = float(n.significant(value, digits).replace(",", "").replace(n.MINUS, "-"))
    assert math.isclose(read, value, rel_tol=0.6 * 10 ** (1 - digits), abs_tol=1e-300)


@given(st.floats(1e-9, 1e9), st.floats(1.01, 1e6), st.booleans())
def test_axes_keep_order_and_ticks_inside(low, factor, log):
    axis = Axis(low, low * factor, log=log)
    ticks = axis.ticks()
    assert ticks == sorted(ticks)
    assert len(ticks) <= 40
    assert all(axis.low - 1e-2 * abs(axis.low) <= t <= axis.high * 1.01 for t in ticks)
    shares = [axis.share(t) for t in (low, *ticks, low * factor)]
    assert shares[0] == 0.0
    assert shares[-1] == pytest.approx(1.0)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(shares))


def test_tag_escapes_children_and_attributes():
    assert tag("text", "<b>", class_='"x"') == '<text class="&#34;x&#34;">&lt;b&gt;</text>'


# Full dichromacy in linear RGB: the matrices of Machado, Oliveira and Fernandes (2009) for severity 1.0.
DEFICIENCIES = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def lab(rgb):
    x, y, z = (
        sum(a * min(max(c, 0.0), 1.0) for a, c in zip(row, rgb, strict=True)) / white
        for row, white in (
            ((0.4124, 0.3576, 0.1805), 0.9505),
            ((0.2126, 0.7152, 0.0722), 1.0),
            ((0.0193, 0.1192, 0.9505), 1.089),
        )
    )
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_schemes_that_meet_in_one_plan_stay_apart_for_every_eye(deficiency):
    matrix = DEFICIENCIES[deficiency]
    schemes = ["bf16", "w8a16", "w8a8-int8", "w8a8-fp8", "w4a16-g128", "w4a16-g64", "w4a16-g32", "w4a8-int8"]
    seen = {}
    for scheme in schemes:
        rgb = linear(look_of(scheme).fill)
        seen[scheme] = lab([sum(a * c for a, c in zip(row, rgb, strict=True)) for row in matrix])
    for one, other in itertools.combinations(schemes, 2):
        apart = math.dist(seen[one], seen[other])
        if look_of(one).label == look_of(other).label:
            assert apart > 15, (one, other, apart)
        else:
            assert apart > 8, (one, other, apart)


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_every_scheme_has_a_look_whose_label_can_be_read(scheme):
    look = look_of(scheme)
    luminances = sorted(
        sum(a * c for a, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True)) for x in (look.fill, look.ink)
    )
    assert (luminances[1] + 0.05) / (luminances[0] + 0.05) >= 4.5
    assert look.label != "?"
    assert look.hatched == (
        scheme.endswith(("-static", "-asym")) or any(x in scheme for x in ("-rows", "-block", "-two-level"))
    )


def test_legends_run_from_few_bits_to_many():
    rising = ["w3a16-g64", "w4a16-g64", "w8a8-int8", "bf16", "nf4"]
    assert in_order(["bf16", "nf4", "w8a8-int8", "w3a16-g64", "w4a16-g64"]) == rising
