"""The documentation: its links lead somewhere, and its first figures are those of the files in docs/results."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
RESULTS = ROOT / "docs" / "results"
CORPORA = CODE, ENGLISH = "python-packages-8k", "english-prose"
LINES_OF_RESULTS = {
    ("1024 = L/8", "recommended"): "own query: select S=1 4 bits, K=1024",
    ("1024", "the paper's, full step every 10"): "paper: refresh S=10, K=1024",
    ("512 = L/16", "recommended"): "own query: select S=1 4 bits, K=512",
    ("512", "the paper's"): "paper: refresh S=10, K=512",
    ("256 = L/32", "recommended"): "own query: select S=1 4 bits, K=256",
    ("256", "the paper's"): "paper: refresh S=10, K=256",
}
"""K and selection of each line of the first table of docs/results.md -> the strategy's name in results.json."""


def without_code(text):
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


@cache
def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


def models():
    """The results of the experiment's models, by name."""
    return json.loads((RESULTS / "smollm2" / "results.json").read_text())


def points(name="smollm2/none/ahead/tradeoff"):
    """The points of one of the experiment's models, by name."""
    return {point["name"]: point for point in models()[name]["results"]["points"]}


def mean_loss(arm, strategy, text):
    """The mean over the arm's seeds."""
    seeds = [name for name in models() if name.startswith(f"smollm2/{arm}/")]
    return fmean(points(name)[strategy]["losses"][text] for name in seeds)


def percent(share, digits):
    return f"{share * 100:.{digits}f} %"


def shown(loss):
    """As docs/results.md writes losses: three digits."""
    return percent(loss, 2 if loss < 0.1 else 1)


def test_the_first_table_of_the_results():
    text = (ROOT / "docs" / "results.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    first = {tuple(line[:2]): line[2:] for line in lines[2 : 2 + len(LINES_OF_RESULTS)]}
    assert lines[0] == ["K", "selection", "bytes read", "code", "English", "code, trained", "English, trained"]
    for line, name in LINES_OF_RESULTS.items():
        untrained = points()[name]
        trained = [mean_loss("paper" if name.startswith("paper") else "recommended", name, text) for text in CORPORA]
        losses = [*(untrained["losses"][text] for text in CORPORA), *trained]
        assert first.pop(line) == [percent(untrained["read"], 1), *map(shown, losses)]
    assert not first


def beginning_of_the_results():
    return (ROOT / "docs" / "results.md").read_text().split("\n## ")[0]


def test_long_generation_in_the_results():
    text = " ".join(beginning_of_the_results().split())
    table = (RESULTS / "generation-trained-english" / "generation.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    found = {(line[0].split(":")[0], line[1]): line[2].split(" ")[0] for line in cells if "K=256" not in line[0]}
    greedy = [found[name, "greedy"] for name in ("recommended", "paper", "full")]
    assert "is {} with the recommended selection, {} with the paper's and {} with full".format(*greedy) in text
    drawn = [f"{float(found[name, 'sampled']):.1f}" for name in ("recommended", "paper", "full")]
    assert "{}, {} and {} with drawn tokens".format(*drawn) in text


TASK_STRATEGIES = (
    "full",
    "recommended: select S=1 4 bits, K=0.125",
    "recommended: select S=2 4 bits, K=0.125",
    "paper: refresh S=10, K=0.125",
    "StreamingLLM, K=0.125",
)
"""Of results.json, in the order of the table of tasks."""


def task_means(length):
    """The strategies' mean scores in percent at a length in thousands of tokens, before any further training."""
    lines = (RESULTS / "smollm2-tasks" / "tables.md").read_text().split(f"## tasks-{length}k")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| none")]
    means = {line[2]: line[-1] for line in cells[: len(TASK_STRATEGIES)]}
    return [means[name] for name in TASK_STRATEGIES]


@pytest.mark.parametrize("length", [4, 8])
def test_the_tasks_of_the_results(length):
    assert f"| {length}K | {' | '.join(task_means(length))} |" in beginning_of_the_results()


def table_of_the_readme():
    lines = (ROOT / "README.md").read_text().split("## What it gives")[1].split("\n\n")[1].splitlines()[2:]
    return dict(line.strip("| ").split(" | ") for line in lines)


def test_the_table_of_the_readme():
    """Its figures are those of docs/results, rounded."""
    table, measured = table_of_the_readme(), points()
    assert len(table) == 7

    def rounded(name, digits):
        point = measured[name]
        return *(percent(point["losses"][corpus], digits) for corpus in (CODE, ENGLISH)), point["read"]

    def after(size):
        name = f"own query: select S=1 4 bits, K={size}"
        return "after training{} {} and {}".format(
            " with the pattern" if size == 1024 else "",
            *(percent(mean_loss("recommended", name, text), 1) for text in CORPORA),
        )

    code, english, read = rounded("own query: select S=1 4 bits, K=1024", 1)
    assert f"{code} (code) and {english} (English)" in table["A small loss"]
    assert f"reads {percent(read, 0)}" in table["A small loss"]
    code, english, read = rounded("paper: refresh S=10, K=1024", 0)
    assert f"{code} and {english} over and read {percent(read, 0)}" in table["A small loss"]
    for size, share in ((512, 16), (256, 32)):
        code, english, read = rounded(f"own query: select S=1 4 bits, K={size}", 1)
        text = f"K = L/{share}: {code} and {english}, reading {percent(read, 0)}, {after(size)}"
        assert text in table["Smaller budgets"]
    assert after(1024) in table["A small loss"]
    full, recommended, _, paper, streaming = task_means(8)
    assert f"full attention {full} %, the recommended settings {recommended} %, the paper's {paper} %" in table["Tasks"]
    assert f"StreamingLLM {streaming} %" in table["Tasks"]

    speeds = json.loads((RESULTS / "decode-h200.json").read_text())
    ms = {(line["context"], line["batch"], line["strategy"]): line["ms"] for line in speeds}
    faster = [ms[case, batch, "full"] / ms[case, batch, "refresh"] for case, batch in ((131072, 1), (16384, 32))]
    expected = "{:.1f} times full attention for one sequence of 128K tokens, {:.1f} times for 32 of 16K"
    assert expected.format(*faster) in table["Faster decoding"]
    blocks = json.loads((RESULTS / "lossless" / "compiled-blocks.json").read_text())
    full = json.loads((RESULTS / "decode-selecting" / "compiled-pooled.json").read_text())
    own = {line["context"]: line["ms"] for line in full if line["strategy"] == "full"}
    gains = {line["context"]: own[line["context"]] / line["ms"] for line in blocks}
    expected = "{:.2f} times as fast for 8 of 32K tokens, {:.2f} times for 32 of 16K"
    assert expected.format(gains[32768], gains[16384]) in table["Lossless decoding"]
    training = {line["case"]: line for line in json.loads((RESULTS / "attention-h200.json").read_text())}
    cases = [training[case] for case in ("32768:16384:10:2048", "131072:65536:50:2048")]
    ratios = [line["refresh"] / line["cudnn"] for line in cases]
    assert "{:.2f} of cuDNN's time at 32K, {:.2f} at 128K".format(*ratios) in table["Faster training attention"]
