"""Composing a configuration: files, overrides, flags, and what is said of mistakes."""

from pathlib import Path

import pytest

from penstock.config import RunConfig, load_config
from penstock.overrides import flatten

ROOT = Path(__file__).parent.parent.parent
NEEDED = {"dataset": "graph", "run_dir": "run"}


def test_the_example_in_deploy_is_accepted() -> None:
    config = load_config(ROOT / "deploy" / "run.yaml")
    assert config.budgets.host_memory == 8 << 30
    assert config.model.num_layers == 3 == len(config.sampler.layer_fanouts)


def test_flags_win_over_overrides_and_those_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("dataset: d\nrun_dir: r\ntrain: {lr: 0.1, epochs: 7, seed: 3}\n")
    config = load_config(file, ["train.lr=0.2", "train.epochs=8"], {"train.lr": 0.3, "train.seed": None})
    assert (config.train.lr, config.train.epochs, config.train.seed) == (0.3, 8, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epoch=3"], "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        (["epochs=3"], "unknown key 'epochs'; did you mean 'train.epochs'?"),
        (["host_memory=1GiB"], "unknown key 'host_memory'; did you mean 'budgets.host_memory'?"),
        (["model.fanouts=[5]"], "did you mean 'sampler.fanouts' or 'evaluate.fanouts'?"),
        (["modle.kind=gcn"], "did you mean 'model'?"),
        (["train.lr=fast"], "train.lr='fast'"),
        (["train.lr"], "is no assignment"),
        (["train.lr=2", "train.lr.x=1"], "is a value, not a section"),
        (["sampler.fanouts=[5,5]", "model.num_layers=3"], "make them equal"),
        (["sampler.fanouts=[5]", "sampler.num_neighbors=[5]"], "both of fanouts"),
        (["sampler.fanouts=[5,0]"], "a fanout of 0"),
        (["evaluate.fanouts=[5]"], "give 2"),
        (["evaluate.fanouts=[5,0]"], "a fanout of 0 in [5, 0] is not possible; use 1 to 2147483647, or -1 for all"),
        (["budgets.disk=much"], "'much' is not a size"),
        (["mode=chunked", "train.precision=bfloat16"], "no effect here: it is for mode=sampled; leave it out"),
        (["mode=chunked", "evaluate.fanouts=[5,5]"], "evaluate.fanouts=[5, 5] has no effect here"),
    ],
)
def test_mistakes_are_named_with_a_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        load_config(None, overrides, NEEDED)
    assert message in str(error.value)


def test_a_missing_dataset_is_named() -> None:
    with pytest.raises(ValueError, match="dataset is missing"):
        load_config(None, [], {"run_dir": "run"})


def test_the_digest_ignores_what_does_not_change_the_outcome() -> None:
    base, log, rate = (
        load_config(None, list(words), NEEDED) for words in ((), ("train.log_every=3",), ("train.lr=1",))
    )
    assert base.digest() == log.digest() != rate.digest()


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    config = load_config(None, [], NEEDED)
    missing = [key for key in flatten(config.model_dump(mode="json")) if f"`{key}`" not in text]
    assert not missing and set(RunConfig.model_fields) >= {"dataset", "run_dir"}
