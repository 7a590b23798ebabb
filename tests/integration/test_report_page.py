"""`report.html` and the pictures: whole, without need of anything else, and with the numbers of result.json."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from penstock.config import RunConfig, load_config
from penstock.effects import chosen, effective
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

_VOID = {"meta", "img", "br"}
SAMPLED = {"budgets.host_memory": "8MiB", "sampler.fanouts": (3, 3), "sampler.batch_size": 32, "train.log_every": 2}
CHUNKED = {"mode": "chunked", "chunked.chunks": 4, "chunked.stages": 2, "model.num_layers": 3}


class Page(HTMLParser):
    """A page taken apart; `problems` has tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = text, list[tuple[str, dict[str, str | None]]]()
        self.problems, self._open = list[str](), list[str]()
        self.words = list[str]()
        self.feed(text)
        self.problems += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1:] != ["style"]:
            self.words.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def panels(self) -> list[list[str]]:
        """The texts of every drawn picture."""
        drawn = re.findall(r"<svg.*?</svg>", self.text, re.DOTALL)
        return [[word.strip() for word in re.findall(r"<text[^>]*>([^<]*)</text>", svg)] for svg in drawn]


def told(picture: Path) -> dict[str, str]:
    """What a picture says of itself."""
    with Image.open(picture) as opened:
        return {key: str(value) for key, value in opened.info.items() if isinstance(key, str)}


def configure(graph: Path, run: Path, given: dict[str, Any]) -> RunConfig:
    flags = {"dataset": str(graph), "run_dir": str(run), "model.hidden": 8, "train.threads": 1, "train.epochs": 3}
    return load_config(None, (), flags | given)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reported") / "graph"
    config = GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1, test=0.1)
    generate_graph(out, config, host_memory=64 << 20)
    return out


@pytest.mark.parametrize("given", [SAMPLED, CHUNKED], ids=["sampled", "chunked"])
def test_a_run_leaves_one_page(given: dict[str, Any], graph: Path, tmp_path: Path) -> None:
    run = tmp_path / "run <one> & more"
    result = train(configure(graph, run, given))
    page = Page((run / "report.html").read_text())
    assert result["artefacts"]["report.html"] == str(run / "report.html")
    assert page.text.startswith("<!doctype html>") and page.problems == []
    assert "run <one> & more" in page.words and "<one>" not in page.text
    _check_it_stands_alone(page)
    _check_it_fits(page)
    _check_its_numbers(page, result)
    assert len(page.panels()) == 2
    pictures = page.all("img")
    assert len(pictures) == (1 if given is CHUNKED else 0)
    assert all(str(picture["src"]).startswith("data:image/png;base64,iVBOR") for picture in pictures)


def _check_it_stands_alone(page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert set(ids.values()) == {1}
    links = [attrs[key] or "" for _, attrs in page.tags for key in ("href", "xlink:href", "src") if key in attrs]
    assert all(link.startswith(("#", "data:")) for link in links)
    inside = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", page.text))
    assert inside and inside <= set(ids)
    assert "@import" not in page.text and not re.search(r"url\((?!#)", page.text)


def _check_it_fits(page: Page) -> None:
    """A narrow screen: a viewport, panels that wrap and grow with it, what is wide scrolls in place."""
    (viewport,) = [meta["content"] for meta in page.all("meta") if meta.get("name") == "viewport"]
    assert viewport == "width=device-width, initial-scale=1"
    assert all("viewbox" in svg and not {"width", "height"} & set(svg) for svg in page.all("svg"))
    assert "minmax(min(100%, 440px), 1fr)" in page.text
    kinds = [attrs.get("class") for tag, attrs in page.tags if tag in ("div", "table")]
    assert "epochs" in kinds and ("scroll" in kinds) == bool(page.all("img"))


def _check_its_numbers(page: Page, result: dict[str, Any]) -> None:
    metrics, times = result["metrics"], result["timings"]
    for split in ("valid", "test"):
        assert f"{metrics[f'{split}_accuracy']:.4f}" in page.words
    assert f"{result['throughput']['items_per_s']:,.4g} items/s over all epochs" in page.words
    assert page.words.index("valid accuracy") < page.words.index("test accuracy")
    for name in ("total", "prepare", "train"):
        at = page.words.index(name)
        assert page.words[at + 1].split()[0] == f"{times[f'{name}_s']:.3g}" or times[f"{name}_s"] >= 60
    shares = [float(found) for found in re.findall(r"style=\"flex:([0-9.]+)", page.text)]
    assert sum(shares) == pytest.approx(3, abs=1e-3), "three bars, each as long as the sum of its parts"
    for entry in result["epochs"]:
        assert f"{entry['train_loss']:.4g}" in page.words and f"{entry['items_per_s']:.4g}" in page.words


def test_only_what_was_given_is_called_given(graph: Path, tmp_path: Path) -> None:
    config = configure(graph, tmp_path / "run", SAMPLED)
    given = {"dataset", "run_dir", "model.hidden", "train.threads", "train.epochs", *SAMPLED}
    assert set(chosen(config)) == given
    assert "chunked.chunks" not in effective(config) and "train.momentum" not in effective(config)
    train(config)
    text = (tmp_path / "run" / "report.html").read_text()
    found = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert found is not None and {line.split(":")[0] for line in found[1].splitlines()} == given


@pytest.mark.parametrize(
    "given", [SAMPLED, {**SAMPLED, "train.log_every": 1000}, pytest.param(CHUNKED, marks=pytest.mark.slow)]
)
def test_curves_show_items_epochs_and_the_best(given: dict[str, Any], graph: Path, tmp_path: Path) -> None:
    result = train(configure(graph, tmp_path / "run", given))
    loss, metric = Page((tmp_path / "run" / "report.html").read_text()).panels()
    assert {"train, epochs", "valid", "loss", "epoch"} <= set(loss)
    assert ("train, items" in loss) == (given is SAMPLED)
    best = f"best: epoch {result['metrics']['best_epoch']}"
    assert best in loss and best in metric and "valid accuracy" in metric
    for panel in (loss, metric):
        ticks = panel[: panel.index("epoch")]
        assert ticks and all(re.fullmatch(r"\d+", tick) for tick in ticks), "epochs are whole"
    assert told(tmp_path / "run" / "curves.png")["Title"].startswith("run: 3 epochs, best valid micro f1 ")


@pytest.mark.slow
def test_the_schedule_tells_waiting_from_sending(graph: Path, tmp_path: Path) -> None:
    result = train(configure(graph, tmp_path / "run", CHUNKED))
    found = told(tmp_path / "run" / "schedule.png")
    assert found["Title"].startswith(f"run, epoch 3: bubble {result['schedule']['bubble']:.0%}")
    labels = found["Description"].split(", ")
    assert {"wait for rows of another rank", "send rows", "forward", "backward"} <= set(labels)


def test_a_run_that_failed_has_no_page(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lower lr"):
        train(configure(graph, tmp_path / "run", SAMPLED | {"train.lr": 1e30}))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run" / "report.html").exists()
