"""A folder with a tiny params.yaml in which stages are run in processes of their own, as DVC would."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import processes
from harken.config import FOLDERS, read_params

ROOT = Path(__file__).parents[2]
CHAIN = """
import sys
from harken.stages.__main__ import main
sys.exit(any(main(stage) for stage in sys.argv[1].split()))
"""
until = functools.partial(processes.until, every_s=0.002)  # what a stage is in the midst of may be over in no time
WORLD = {
    "seed": 3,
    "n_train": 16,
    "n_captioned": 8,
    "n_val": 3,
    "n_test": 4,
    "n_balanced": 4,
    "n_eval": 4,
    "n_clotho_train": 2,
    "n_clotho_val": 2,
    "n_clotho_test": 2,
    "width": 64,
    "height": 48,
    "fps": 10,
    "unavailable": 0.15,
    "broken": 0.15,
    "n_sounds": None,
    "sound_s": None,
    "background_db": [-50.0, -40.0],
    "further": None,
    "told": None,
}


def tiny_params() -> dict[str, Any]:
    """The committed params with tiny sizes: every recipe is kept, each trained for two short epochs."""
    p = read_params(ROOT / "params.yaml")
    p["lists"]["world"] = WORLD
    p["catalog"]["n_shards"] = 3
    shape = {"image_size": 32, "patch": 16, "width": 32, "layers": 1, "head_width": 16}
    shape |= {"embed_dim": 16, "text_width": 32, "text_layers": 1, "context_length": 16}
    p["weights"]["clip"] |= {"shape": shape, "n_pairs": 32, "steps": 4, "batch": 16}
    p["weights"]["bert"] |= {"dim": 16, "layers": 1, "heads": 2, "max_tokens": 64}
    p["weights"]["bert"]["masked"] |= {"n_captions": 40, "steps": 3, "batch": 8}
    p["extract"]["image_short_side"] = 32
    p["pretrain"] |= {"vit": {"n_frames": 200, "stride": [16, 32]}}
    p["pretrain"] |= {"augment": {"freq_mask": 8, "time_mask": 20, "roll": True, "gain_db": 4.0}}
    p["pretrain"] |= {"batch": 4, "epochs": 2, "checkpoint_every": 1}
    p["finetune"] |= {"batch": 4, "epochs": 2, "checkpoint_every": 1}
    p["train"] |= {
        "hidden": 16,
        "joint": 16,
        "batch": {"audiocaps": 3, "clotho": 2},
        "epochs": 2,
        "checkpoint_every": 1,
    }
    p["train"]["length_s"] = {"audiocaps": 4.0, "clotho": 4.0}
    p["weights"]["panns"]["cnn14"]["width"] = 2
    p["weights"]["panns"]["cnn14"]["start"] |= {"epochs": 1, "batch": 4}
    for recipe in p["train"]["recipes"].values():
        if "dp" in recipe["pooling"]:
            recipe["pooling"]["dp"] = 8
    for recipe in p["pretrain"]["recipes"].values():
        if "n_warmup" in recipe:
            recipe["n_warmup"] = 1
    for stage in ("pretrain", "finetune"):
        p[stage]["optimizer"]["schedule"] = {"name": "warmup_cosine", "warmup_epochs": 1, "final": 0.001}
    p["evaluate"]["n_resamples"] = 50
    p["report"]["n_resamples"] = 100
    return p


@dataclass
class Corridor:
    """A folder with a params.yaml in which stages are run."""

    root: Path
    params: dict[str, Any]

    def write(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / "params.yaml", "w") as f:
            YAML(typ="safe", pure=True).dump(self.params, f)

    def path(self, name: str) -> Path:
        """The folder that `paths.name` names."""
        return self.root / str(self.params["paths"][name])

    def run_all(self, waves: Sequence[Sequence[str]]) -> None:
        """Run stages wave by wave. A wave is of chains, which run side by side, the stages of one in one process."""
        for wave in waves:
            for process in [self.start(chain) for chain in wave]:
                said, _ = process.communicate(timeout=200)
                assert process.returncode == 0, said

    def start(self, stage: str, together: int = 1, torchrun: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
        """A stage, by itself or by `together` processes under torchrun; its process leads a group of its own.

        Several, with blanks between, run one after the other in one process.
        """
        settings = {"HARKEN_PARAMS": "params.yaml", "HARKEN_ENGINE": "inline", "CI": "1", "HARKEN_DEVICE": "cpu"}
        settings |= {"PYTHONPATH": str(ROOT / "src"), **env}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(together), *torchrun]
        alone = launcher if together > 1 else []
        return subprocess.Popen(
            [sys.executable, *(["-c", CHAIN, stage] if " " in stage else [*alone, "-m", "harken.stages", stage])],
            cwd=self.root,
            env={**os.environ, **settings},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ended(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The exit status of a stage that was started, and what it said."""
        try:
            said, _ = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return process.returncode, said

    def run(self, stage: str, together: int = 1, **env: str) -> str:
        """What the stage said. Fails the test where it did not end with status 0."""
        status, said = self.ended(self.start(stage, together, **env))
        assert status == 0, said
        return said


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file under a folder, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy_before(corridor: Corridor, stage: str, root: Path) -> Corridor:
    """The corridor as it was before a stage, by hard links: no stage may write into what it did not make."""
    shutil.copytree(corridor.root, root, copy_function=os.link)
    (root / "params.yaml").unlink()  # a test may write other ones
    made = Corridor(root, copy.deepcopy(corridor.params))
    (made.path("work") / "timings.jsonl").unlink()  # the one file that is appended to
    made.write()
    shutil.rmtree(made.path(FOLDERS[stage]))
    shutil.rmtree(made.path("work") / stage)
    return made
