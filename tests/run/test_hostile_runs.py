"""Files of a run that contradict each other are refused in one line, before they cost anything."""

import json
import os
import re
import shutil
from contextlib import nullcontext

import pytest
import torch
from faults.mutations import in_child
from tiny import new_run, tiny_options

from vglann_fast.cli.main import main
from vglann_fast.clips.dataset import ClipSet
from vglann_fast.errors import VglannError
from vglann_fast.experiments.moving_squares import moving_squares, write_clip_folder
from vglann_fast.glo.assemble import new_training
from vglann_fast.mapping.em import Mixture
from vglann_fast.mapping.fit import KINDS, load_mapping
from vglann_fast.options.mapping import map_options
from vglann_fast.options.presets import PRESETS
from vglann_fast.run.folder import RunDir
from vglann_fast.samples.sample import interpolate, sample

SMALL = {
    "imle": {"hidden": 4, "noise_dim": 2},
    "vae": {"hidden": 4, "noise_dim": 2},
    "flow": {"hidden": 4, "transforms": 1, "bins": 2},
    "autoregressive": {"hidden": 4, "transforms": 1},
    "drifting": {"hidden": 4, "noise_dim": 2},
    "flow-matching": {"hidden": 4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two steps, with mappings that were never fitted."""
    root = tmp_path_factory.mktemp("sizes")
    clips = write_clip_folder(root / "clips", moving_squares(6))
    run = new_run(root / "run", clips, tiny_options(batch_size=2, epochs=2))
    new_training(ClipSet.open(clips), tiny_options(batch_size=2, epochs=2), run).loop(max_steps=2)
    for kind, values in SMALL.items():
        folder = run.path / "mapping" / kind
        folder.mkdir(parents=True)
        if "transforms" in values:
            pytest.importorskip("zuko")
        KINDS[kind](8, map_options(PRESETS["demo"].map, kind, values)).save(folder)
    return run.path


@pytest.fixture
def changed():
    """changed(file, **values) puts values into a file of JSON; all is as before in the end."""
    before = []

    def change(file, **values):
        before.append((file, file.read_bytes()))
        file.write_text(json.dumps({**json.loads(before[-1][1]), **values}))

    yield change
    for file, content in reversed(before):
        file.write_bytes(content)


def load_in_child(run, kind):
    """Return the error of `load_mapping` in a process of a gigabyte and half a minute."""

    def load():
        with pytest.raises(VglannError) as caught:
            load_mapping(RunDir.open(run), kind)
        return str(caught.value)

    return in_child(load)


@pytest.mark.parametrize("kind", SMALL)
def test_a_mapping_has_the_size_of_its_tensors(kind, made, changed):
    load_mapping(RunDir.open(made), kind)
    file = made / "mapping" / kind / "mapping.json"
    whole = json.loads(file.read_text())["options"]
    for name in SMALL[kind]:
        changed(file, options={**whole, name: 1000})
        said = load_in_child(made, kind)
        assert re.search(r"not a mapping that can be read .*(by mapping\.json|hyper)", said), said
        with pytest.raises(VglannError, match=f"--{name.replace('_', '-')}: expected 1 to"):
            map_options(PRESETS["demo"].map, kind, {name: 10**9 + 1})


def test_a_mapping_of_another_run_is_named(made, changed):
    folder = made / "mapping" / "gaussian"
    folder.mkdir()
    mapping = KINDS["gaussian"](5, map_options(PRESETS["demo"].map, "gaussian", {}))
    mapping.mean, mapping.factor = torch.zeros(5), torch.eye(5)
    mapping.save(folder)
    with pytest.raises(VglannError, match="not latents of this run"):
        sample(made, n=2, kind="gaussian")


@pytest.mark.parametrize("values", [{"width": 4096}, {"latent_dim": 65536}])
def test_a_resume_costs_no_more_than_the_checkpoint_has(values, made, changed, capfd):
    train = json.loads((made / "options.json").read_text())["train"]
    changed(made / "options.json", train={**train, **values})
    assert in_child(lambda: str(main(["train", "--resume", str(made)]))) == "2"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 2**62}, "step 2 of pass"),
        ({"position": 3}, "step 3 of pass 0, of 2 passes of 3"),
        ({"epoch": 2, "position": 1}, "of pass 2"),
        ({"step": 2**62}, "state.json is of step"),
    ],
)
def test_a_place_beyond_the_training_is_refused(values, said, made, changed, capfd):
    (checkpoint,) = (made / "checkpoints").iterdir()
    changed(checkpoint / "state.json", **values)
    assert main(["train", "--resume", str(made)]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.tensor([1.5, -0.5]), "weights are negative"),
        (torch.zeros(2), "weights are negative, or all zero"),
        (torch.ones(2, 1), "do not fit together"),
        (torch.tensor([1.0, float("nan")]), "weights is not finite"),
        (torch.ones(2, dtype=torch.int64), None),
    ],
)
def test_a_mixture_has_weights(weights, said, tmp_path):
    mapping = KINDS["gmm"](3, map_options(PRESETS["demo"].map, "gmm", {}))
    mapping.mixture = Mixture(weights, torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1))
    mapping.save(tmp_path)
    with nullcontext() if said is None else pytest.raises(VglannError, match=said):
        assert KINDS["gmm"].load(tmp_path, torch.device("cpu")).sample(2, torch.Generator()).shape == (2, 3)


def test_a_pipe_in_place_of_a_mapping_is_not_read(made):
    file = made / "mapping" / "imle" / "mapping.safetensors"
    file.rename(made / "away")
    os.mkfifo(file)
    try:
        assert "not a regular file" in (load_in_child(made, "imle") or "")
    finally:
        (made / "away").replace(file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kernels": "0.1.0"}, "environment.json: kernels '0.1.0'"),
        ({"kernels": ["auto"]}, "environment.json: kernels"),
        ({"cpu_threads": 2**40, "kernels": "x"}, "environment.json: kernels"),
    ],
)
def test_a_replay_takes_no_nonsense_from_the_environment(values, said, made, changed, capsys):
    changed(made / "environment.json", **values)
    assert main(["replay", str(made)]) == 2
    assert said in capsys.readouterr().err


def test_an_environment_that_is_no_object_is_named(made, changed, capsys):
    changed(made / "environment.json")
    (made / "environment.json").write_text("[]")
    for words in (["replay", str(made)], ["train", "--resume", str(made)]):
        assert main(words) == 2
        assert "environment.json: not a JSON object" in capsys.readouterr().err


def test_a_replay_takes_no_nonsense_from_the_history(made, capsys):
    (made / "media" / "samples").mkdir(parents=True)
    line = {"verb": "sample", "options": {"n": "x", "kind": "imle"}}
    (made / "history.jsonl").write_text(json.dumps(line))
    assert main(["replay", str(made)]) == 2
    assert "history.jsonl: the options of sample are damaged" in capsys.readouterr().err


def test_one_latent_has_no_way_to_another(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    run = RunDir.open(tmp_path / "run")
    state, parts = run.checkpoints.load()
    parts["latents"] = {"rows": parts["latents"]["rows"][:1]}
    run.checkpoints.save(3, parts, {**state, "step": 3, "ids": state["ids"][:1]})
    with pytest.raises(VglannError, match="one latent"):
        interpolate(run.path)
