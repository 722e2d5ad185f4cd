"""--config FILE: what it may hold, what goes before it, and that a dry run prints one."""

import json

import pytest
import yaml

from vglann_fast.cli.main import main
from vglann_fast.cli.words import parse

TRAIN = ["train", "clips", "--out", "run"]


@pytest.fixture
def config(tmp_path):
    """A function that writes a config file and returns the words that name it."""

    def write(content):
        file = tmp_path / "run.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", str(file)]

    return write


def test_names_have_dashes_or_underscores_and_values_mean_what_they_mean_on_the_command_line(config):
    text = "lr-latents: 1e-2\nlr_generator: 3e-3\ncuda-graph: off\nloss: laplacian:1,l1:0.5\ncompile: yes\nseed: 7\n"
    a = parse([*TRAIN, *config(text)])
    assert (a.lr_latents, a.lr_generator, a.cuda_graph, a.loss) == (0.01, 0.003, "off", "laplacian:1,l1:0.5")
    assert (a.compile, a.seed, a.epochs) == (True, 7, None)


def test_flags_lists_and_nothing(config):
    a = parse(["table", *config("losses: [l1, l2]\nmappings: imle\nclips: c\nout: t\nn: ~\n")])
    assert (a.losses, a.mappings, a.clips, a.out, a.n) == (["l1", "l2"], ["imle"], "c", "t", None)
    assert parse([*TRAIN, *config("tensorboard: true\n")]).tensorboard is True
    assert parse([*TRAIN, *config("tensorboard: false\n")]).tensorboard is False
    assert parse(["map", *config("components: 12\nrun: r\nkind: gmm\n")]).components == "12"


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(config, capsys):
    words = config("preset: paper\nepochs: 5\nlog-every: 3\nlr-latents: 0.5\n")
    assert main([*TRAIN, *words, "--epochs", "6", "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["epochs"], printed["log_every"], printed["lr_latents"]) == (6, 3, 0.5)
    assert (printed["preset"], printed["blur"], printed["lr_generator"]) == ("paper", "paper", 0.001)
    assert main([*TRAIN, *words, "--preset", "demo", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 32


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte-order mark"])
def test_utf8_and_json(config, bom):
    content = json.dumps({"clips": "каталог 🎞", "out": "öö", "epochs": 3, "compile": True})
    raw = json.dumps({"clips": "каталог 🎞", "out": "öö", "epochs": 3, "compile": True}, ensure_ascii=False)
    for text in (content, raw):
        a = parse(["train", *config(bom + text.encode())])
        assert (a.clips, a.out, a.epochs, a.compile) == ("каталог 🎞", "öö", 3, True)


WRONG = {
    "an unknown name": ("epoks: 3\n", "did you mean --epochs?"),
    "a name that is not one": ("zzz: 3\n", "--zzz is not an option of `vglann train`"),
    "itself": ("config: other.yaml\n", "--config is not an option"),
    "a repeated name": ("epochs: 3\nepochs: 4\n", "epochs is there twice"),
    "a name repeated with dashes": ("log-every: 3\nlog_every: 4\n", "log_every is there twice"),
    "tabs": ("train:\n\tepochs: 3\n", "tabs"),
    "a list for a number": ("epochs: [3, 4]\n", "epochs: expected one value, got a list"),
    "a mapping for a number": ("epochs: {a: 3}\n", "epochs: expected one value, got a mapping"),
    "text for a number": ("epochs: many\n", "epochs: expected a whole number"),
    "a fraction for a whole number": ("epochs: 3.5\n", "epochs: expected a whole number"),
    "an unknown choice": ("preset: best\n", "preset: expected paper, modern, modern-2026a or demo"),
    "a bad value of the training": ("batch_size: 1\n", "--batch-size: expected at least 2"),
    "a list of lines": ("- epochs\n", "expected a mapping"),
    "a word": ("epochs", "expected a mapping"),
    "a list as a name": ("[a, b]: 3\n", "expected the name of an option"),
    "two documents": ("epochs: 3\n---\nepochs: 4\n", "not YAML"),
    "torn JSON": ('{"epochs": 3', "not YAML: line"),
    "not text": (b"\xff\xfe\x00", "not UTF-8"),
    "nothing printable": (b"epochs: \x00", "not YAML"),
    "deeper than deep": ("[" * 5000, "not YAML"),
    "larger than options are": ("# " + "x" * 1_000_000, "larger than"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_config_is_one_line_that_names_the_file(name, config, capsys):
    content, message = WRONG[name]
    assert main([*TRAIN, *config(content)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert message in error
    assert "run.yaml" in error or "--batch-size" in error


def test_a_config_that_cannot_be_read(tmp_path, capsys):
    assert main([*TRAIN, "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
    assert main([*TRAIN, "--config", str(tmp_path)]) == 2
    assert "--config" in capsys.readouterr().err


def test_an_empty_config_changes_nothing(config):
    assert vars(parse([*TRAIN, *config("# nothing\n")])) | {"config": None} == vars(parse(TRAIN))


def test_an_anchor_that_holds_itself_is_refused(config, capsys):
    assert main([*TRAIN, *config("epochs: &a [*a]\n")]) == 2
    assert "expected one value" in capsys.readouterr().err


def dry_run(words, capsys):
    assert main([*words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_what_a_dry_run_prints_is_a_config_of_the_same_run(untouched, config, tmp_path, capsys):
    run, clips = str(untouched / "run"), str(untouched / "clips")
    commands = {
        "train": ["train", clips, "--out", str(tmp_path / "new"), "--preset", "paper", "--log-every", "3"],
        "resume": ["train", "--resume", run, "--lr-latents", "0.5", "--tensorboard"],
        "map": ["map", run, "--kind", "gmm", "--components", "1,2", "--seed", "4", "--deterministic"],
    }
    for words in commands.values():
        printed = dry_run(words, capsys)
        assert dry_run([words[0], *config(printed)], capsys) == printed
        # As YAML that a person would write.
        written = yaml.safe_dump(json.loads(printed))
        assert dry_run([words[0], *config(written)], capsys) == printed


def test_a_training_from_a_config_is_the_training(untouched, tiny, config, tmp_path, capsys):
    words = ["train", str(untouched / "clips"), *tiny, "--epochs", "1", "--seed", "2"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    printed = dry_run([*words, "--out", str(tmp_path / "two")], capsys)
    assert main(["train", *config(printed)]) == 0
    assert (tmp_path / "one/options.json").read_bytes() == (tmp_path / "two/options.json").read_bytes()
    one, two = (max((tmp_path / name / "checkpoints").iterdir()) for name in ("one", "two"))
    for file in ("generator.safetensors", "latents.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()


@pytest.mark.parametrize(
    ("command", "missing"), [("train", "CLIPS and --out RUN"), ("map", "RUN"), ("table", "--out DIR")]
)
def test_what_neither_the_command_line_nor_the_config_gives_is_named(command, missing, config, capsys):
    assert main([command, *config("seed: 3\n")]) == 2
    assert f"{missing} missing" in capsys.readouterr().err
