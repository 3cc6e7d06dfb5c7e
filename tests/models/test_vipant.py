"""VIP-ANT's checkpoints: what they compute is what the imported tower computes, and nothing that they name is run."""

from __future__ import annotations

import builtins
import copyreg
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harken.errors import DataError
from harken.models import vipant as vipant_module
from harken.models.audio_vit import AudioViT
from harken.models.towers import LOGIT_SCALE_INIT, AudioTower
from harken.models.vipant import KEYS, VipAnt, _Dict, _Inert, _Tensor, convert, read_vipant, write_run
from harken.stages.pretrain import WHOLE, VitConfig
from harken.training.runs import finish, load_model, runs_in
from harken.training.state import TrainState

VIT = {"n_frames": 200, "stride": [16, 24]}


def tower(**shape: Any) -> AudioTower:
    """Ours, with no weight at zero or one, so that no two can be mistaken for each other."""
    vit = AudioViT(**({"width": 64, "layers": 2, "heads": 1, "embed_dim": 16, "n_frames": 200} | shape))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in vit.parameters():
            p += 0.3 * len(vit.class_embedding) ** -0.5 * torch.randn(p.shape, generator=generator)
        ours = AudioTower(vit).eval()
        ours.logit_scale.fill_(3.25)
    return ours


def as_vipant(vit: AudioViT) -> OrderedDict[str, Tensor]:
    """Our tower in VIP-ANT's layout, by the documented map of keys read backwards."""
    head = OrderedDict()
    for name, value in vit.state_dict().items():
        for theirs, ours in KEYS.items():
            if name == ours or (ours.endswith(".") and name.startswith(ours)):
                head[theirs + name.removeprefix(ours)] = value
    assert len(head) == len(vit.state_dict())
    head._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as nn.Module.state_dict leaves it
    return head


@pytest.fixture
def config() -> Iterator[Callable[[], Any]]:
    """Makes a config of a package that is there when a checkpoint is written and gone when it is read."""
    module = types.ModuleType("faraway")
    source = """
import collections, enum, typing
class Flag(enum.Enum):
    A = 1
class Node:
    def __init__(self, value, parent=None):
        self.__dict__.update(value=value, parent=parent, kind=typing.Any, flag=Flag.A, type=dict)
class Config(dict):
    def __init__(self):
        super().__init__(seen=collections.defaultdict(list, a=[1]), some={1, 2}, raw=b"x", many=Items([3]))
        self.content = {"model": Node("audio", self), "norms": [-4.93839311, 5.75751113]}
    def __setstate__(self, state):
        raise AssertionError("run")
class Items(list):
    pass
"""
    exec(source, module.__dict__)
    for kind in ("Flag", "Node", "Config", "Items"):
        module.__dict__[kind].__module__ = "faraway"
    sys.modules["faraway"] = module

    def make() -> Any:
        return module.__dict__["Config"]()

    yield make
    sys.modules.pop("faraway", None)


def write(path: Path, content: Any, *, legacy: bool = False) -> Path:
    """As VIP-ANT writes; the package of its config is gone afterwards."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    sys.modules.pop("faraway", None)
    return path


def checkpoint(audio: Mapping[str, Any], loss: Mapping[str, Any] | None = None, cfg: Any = None) -> dict[str, Any]:
    return {"cfg": cfg, "model": (audio, {"logit_scale": torch.tensor(3.25)} if loss is None else loss)}


def imported(vipant: VipAnt, n_frames: int) -> AudioTower:
    """A tower of other weights, with those of the checkpoint put in."""
    shape = {k: vipant.facts[k] for k in ("width", "layers", "heads", "embed_dim")}
    other = AudioTower(AudioViT(n_frames=n_frames, **shape)).eval()
    other.load_state_dict(convert(vipant, n_frames))
    return other


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "sequence"])
@pytest.mark.parametrize("heads", [2, 4])
def test_what_was_exported_comes_back_bit_for_bit(tmp_path: Path, config: Any, heads: int, legacy: bool) -> None:
    ours = tower()
    audio, loss = as_vipant(ours.vit), OrderedDict(logit_scale=ours.logit_scale.detach())
    image, text = OrderedDict(proj=torch.zeros(3)), OrderedDict()
    model = (audio, loss) if heads == 2 else (image, audio, text, loss)
    path = write(tmp_path / "v.pth", {"cfg": config(), "model": model}, legacy=legacy)
    with pytest.raises((pickle.UnpicklingError, ModuleNotFoundError)):
        torch.load(path, weights_only=True)
    found = read_vipant(path)
    back = imported(found, 200)
    x = torch.randn(3, 200, 128)
    with torch.no_grad():
        assert torch.equal(back.segments(x), ours.segments(x))
    assert torch.equal(back.logit_scale, ours.logit_scale)
    assert {"faraway.Config", "faraway.Node", "faraway.Items", "faraway.Flag"} <= set(found.facts["not_imported"])
    assert "faraway" not in sys.modules
    shape = {k: found.facts[k] for k in ("width", "layers", "heads", "patch", "embed_dim", "in_channels", "positions")}
    assert shape == {
        "width": 64,
        "layers": 2,
        "heads": 1,
        "patch": 32,
        "embed_dim": 16,
        "in_channels": 3,
        "positions": 56,
    }


def literal(head: Mapping[str, Tensor], x: Tensor, stride: tuple[int, int]) -> Tensor:
    """VIP-ANT's audio head on (clip, 1, frame, mel), from its own keys, step by step in float64."""
    w = {k: v.double() for k, v in head.items()}
    width, n_heads = len(w["misc.class_embedding"]), len(w["misc.class_embedding"]) // 64
    norm = lambda x, key: F.layer_norm(x, (width,), w[f"{key}.weight"], w[f"{key}.bias"], 1e-5)  # noqa: E731
    x = F.conv2d(x.double(), w["pre_encoder.conv1.weight"].mean(1, keepdim=True), stride=stride)
    x = x.flatten(2).permute(0, 2, 1)
    x = torch.cat([w["misc.class_embedding"].expand(len(x), 1, -1), x], 1) + w["misc.positional_embedding"]
    x = norm(x, "pre_encoder.ln")
    for i in range(sum(k.endswith("in_proj_weight") for k in w)):
        block = f"encoder.resblocks.{i}"
        qkv = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = (t.unflatten(-1, (n_heads, 64)).transpose(1, 2) for t in qkv.chunk(3, -1))
        mixed = ((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mixed @ w[f"{block}.attn.out_proj.weight"].T + w[f"{block}.attn.out_proj.bias"]
        hidden = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + hidden @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
    return norm(x[:, 0], "post_encoder.ln") @ w["post_encoder.proj"]


@pytest.mark.parametrize("channels", [3, 1])
def test_it_computes_what_vip_ant_computes(tmp_path: Path, channels: int) -> None:
    ours = tower(width=128, heads=2)
    head = as_vipant(ours.vit)
    if channels == 1:
        head["pre_encoder.conv1.weight"] = head["pre_encoder.conv1.weight"].mean(1, keepdim=True)
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(head)))
    assert found.facts["in_channels"] == channels
    assert found.tensors["conv1.weight"].shape == (128, 3, 32, 32)
    x = torch.randn(2, 200, 128)
    with torch.no_grad():
        embedded = imported(found, 200).segments(x)[:, 0]
    expected = literal(head, x[:, None], (16, 24)).float()
    torch.testing.assert_close(F.normalize(embedded, dim=-1), F.normalize(expected, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_the_papers_size(tmp_path: Path) -> None:
    ours = tower(width=768, layers=12, heads=12, embed_dim=512, n_frames=1000)
    head = as_vipant(ours.vit)
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(head)))
    assert (found.facts["positions"], found.facts["heads"], found.facts["layers"]) == (306, 12, 12)
    assert sum(t.numel() for t in found.tensors.values()) == 88_045_824
    x = torch.randn(1, 1000, 128)
    with torch.no_grad():
        embedded = imported(found, 1000).segments(x)
        assert torch.equal(embedded, ours.segments(x))
    expected = literal(head, x[:, None], (16, 24)).float()
    torch.testing.assert_close(F.normalize(embedded[:, 0], dim=-1), F.normalize(expected, dim=-1), atol=1e-6, rtol=0)


def test_the_prefix_of_a_parallel_wrapper_is_taken_off(tmp_path: Path) -> None:
    ours = tower()
    head = {f"module.{k}": v for k, v in as_vipant(ours.vit).items()}
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(head, {"module.logit_scale": torch.tensor(2.0)})))
    assert found.logit_scale == 2.0
    assert all(torch.equal(found.tensors[k], v) for k, v in ours.vit.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "scale", "source"),
    [
        ({"loss_head_va.logit_scale": torch.tensor(4.0), "loss_head_al.logit_scale": torch.tensor(5.0)}, 4.0, "_va"),
        ({"loss_head_al.logit_scale": torch.tensor(5.0)}, 5.0, "_al"),
        ({"bn.num_batches_tracked": torch.tensor(7)}, LOGIT_SCALE_INIT, "absent: ln(1/0.07)"),
    ],
)
def test_where_the_logit_scale_comes_from_is_told(tmp_path: Path, loss: Any, scale: float, source: str) -> None:
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit), loss)))
    assert (found.logit_scale, source in found.facts["logit_scale_from"]) == (scale, True)


def test_half_precision_and_views_of_a_larger_storage_are_read(tmp_path: Path) -> None:
    head = as_vipant(tower().vit)
    half = {k: v.half() for k, v in head.items()}
    wide = torch.randn(20, 128)
    half["post_encoder.proj"] = wide[3:19, ::2].T  # a stride and an offset
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(half)))
    assert torch.equal(found.tensors["proj"], wide[3:19, ::2].T)
    assert torch.equal(found.tensors["ln_pre.bias"], head["pre_encoder.ln.bias"].half().float())


def test_a_config_of_omegaconf_itself_is_passed_over(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    cfg = omegaconf.OmegaConf.create({"model": {"audio": {"stride": [16, 24], "width": "${model.w}"}, "w": 64}})
    found = read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit), cfg=cfg)))
    assert "omegaconf.dictconfig.DictConfig" in found.facts["not_imported"]


def test_an_imported_run_has_what_a_pretrained_one_has(tmp_path: Path) -> None:
    ours = tower()
    vipant = read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(ours.vit))))
    folder = tmp_path / "runs" / "vip_ant_official-20"
    official = {"recipe": "vip_ant_official", "seed": 20, "side": WHOLE.model_dump(), "dataset": "audioset", "vit": VIT}
    write_run(vipant, folder, tower(), official)
    (told,) = runs_in(tmp_path / "runs")
    keys = ["recipe", "seed", "side", "vit", "n_train", "n_val", "dataset", "n_held_out", "n_left_out"]
    facts = {k: told[k] for k in (*keys, "imported")}
    finish(tmp_path / "trained", ours, TrainState(), facts)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "trained").iterdir())
    for name in ("model.safetensors", "history.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "trained" / name).read_bytes(), name
    assert told.keys() - {"run"} == json.loads((tmp_path / "trained" / "run.json").read_text()).keys()
    assert VitConfig.model_validate_json(json.dumps(told["vit"])).stride == (16, 24)
    assert (told["side"]["n_segments"], told["steps"], told["imported"]["sha256"]) == (1, None, vipant.facts["sha256"])
    back = load_model(tmp_path / "runs", "vip_ant_official-20", tower(layers=2))
    assert torch.equal(back.get_parameter("vit.conv1.weight"), ours.vit.conv1.weight)
    with pytest.raises(
        DataError, match=r"this preset's CLIP:\n +key +found +expected\n +vit.proj +\(64, 16\) +\(64, 8\)$"
    ):
        write_run(vipant, tmp_path / "none", tower(embed_dim=8), official)
    with pytest.raises(DataError, match="has 1 heads, this preset's CLIP has 2"):
        write_run(vipant, tmp_path / "none", tower(heads=2), official)
    assert not (tmp_path / "none").exists()


# What does not fit


def test_the_grid_must_be_that_of_the_positions(tmp_path: Path) -> None:
    vipant = read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit))))
    with pytest.raises(DataError, match=r"56 positions.* grid of 61 x 5, 306 rows\."):
        convert(vipant)
    with pytest.raises(DataError, match=r"grid of 11 x 7, 78 rows.*that fits: .*\(16, 24\), a grid of 11 x 5"):
        convert(vipant, 200, (16, 16))
    square = read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(tower(pos_grid=(7, 7)).vit))))
    with pytest.raises(DataError, match="7 x 7 is what an image tower has"):
        convert(square)


def test_another_architecture_is_met_with_a_table_of_shapes(tmp_path: Path) -> None:
    head = as_vipant(tower().vit)
    del head["misc.class_embedding"]
    head["post_encoder.ln.weight"] = torch.zeros(65)
    head["encoder.resblocks.1.attn.bias_k"] = torch.zeros(1, 1, 64)
    with pytest.raises(DataError) as e:
        read_vipant(write(tmp_path / "v.pth", checkpoint(head)))
    rows = [line.split(maxsplit=1) for line in str(e.value).splitlines()[1:]]
    assert [(k, " ".join(v.split())) for k, v in rows] == [
        ("key", "found expected"),
        ("encoder.resblocks.1.attn.bias_k", "(1, 1, 64) none"),
        ("misc.class_embedding", "none (64,)"),
        ("post_encoder.ln.weight", "(65,) (64,)"),
    ]
    assert "width 64 with 2 layers" in str(e.value)
    resnet = {"pre_encoder.conv1.weight": torch.zeros(32, 3, 3, 3), "encoder.layer1.0.bn1.bias": torch.zeros(64)}
    with pytest.raises(DataError, match=r"encoder\.layer1\.0\.bn1\.bias +\(64,\) +none[^$]*and \d+ more"):
        read_vipant(write(tmp_path / "v.pth", checkpoint(resnet)))
    with pytest.raises(DataError, match="width 96 is no multiple of 64"):
        read_vipant(write(tmp_path / "v.pth", checkpoint(as_vipant(tower(width=96).vit))))


def test_what_is_no_checkpoint_of_vip_ant_is_refused(tmp_path: Path) -> None:
    head, path = as_vipant(tower().vit), tmp_path / "v.pth"
    with pytest.raises(DataError, match="no such file"):
        read_vipant(path)
    three = {"model": ({}, head, {})}
    for wrong in ({"state": {}}, [1], three, {"model": (head, None)}, {"model": ({1: head}, {})}, {"model": head}):
        with pytest.raises(DataError, match="not a VIP-ANT checkpoint"):
            read_vipant(write(path, wrong))
    with pytest.raises(DataError, match=r"proj is no tensor"):
        read_vipant(write(path, checkpoint({**head, "post_encoder.proj": [1.0]})))
    with pytest.raises(DataError, match=r"proj is torch.int64"):
        read_vipant(write(path, checkpoint({**head, "post_encoder.proj": torch.zeros(64, 16, dtype=torch.int64)})))
    bad = {**head, "post_encoder.proj": torch.full((64, 16), torch.nan)}
    write(path, checkpoint(bad, {"logit_scale": torch.tensor(torch.inf)}))
    with pytest.raises(DataError, match=r"proj, logit_scale: not all numbers are finite"):
        read_vipant(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_short_is_refused(tmp_path: Path, legacy: bool) -> None:
    whole = write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit)), legacy=legacy).read_bytes()
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.pth").write_bytes(whole[:n])
        with pytest.raises(DataError, match=r"read safely|than the file has"):
            read_vipant(tmp_path / "cut.pth")


def test_one_changed_bit_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit)))
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda i: i.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="CRC"):
        read_vipant(path)


# What is made to do harm


class Payload:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __call__(self) -> None:
        """So that a payload can be what another one calls."""

    def __reduce__(self) -> Any:
        return self.call


def payloads() -> dict[str, Payload]:
    return {
        "os.system": Payload(os.system, "touch ran"),
        "eval": Payload(builtins.eval, "open('ran', 'w')"),
        "exec": Payload(builtins.exec, "open('ran', 'w')"),
        "path": Payload(Path.touch, Path("ran")),
        "getattr": Payload(Payload(builtins.getattr, Path("ran"), "touch")),
        "torch": Payload(torch.save, [1], "ran"),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "sequence"])
@pytest.mark.parametrize("name", list(payloads()))
def test_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    head, payload = as_vipant(tower().vit), payloads()[name]
    found = read_vipant(write(Path("v.pth"), checkpoint(head, cfg=payload), legacy=legacy))
    assert found.facts["not_imported"]  # and told by name
    assert torch.equal(found.tensors["proj"], head["post_encoder.proj"])
    for wrong in (payload, {"model": payload}, {"model": (payload, {})}, checkpoint({**head, "x": payload})):
        with pytest.raises(DataError):
            read_vipant(write(Path("v.pth"), wrong, legacy=legacy))
    scaled = checkpoint(head, {"logit_scale": payload})
    with pytest.raises(DataError, match="logit_scale is no tensor"):
        read_vipant(write(Path("v.pth"), scaled, legacy=legacy))
    assert [p.name for p in tmp_path.iterdir()] == ["v.pth"]


def test_names_that_would_steer_a_terminal_are_told_harmlessly(tmp_path: Path) -> None:
    path = write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit), cfg=Payload(os.system, "x")))
    name = f"{os.system.__module__}\nsystem\n".encode()
    data = path.read_bytes()
    assert data.count(name) == 1
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        stored = {n.rsplit("/", 1)[1]: archive.read(n) for n in archive.namelist() if "/data/" in n}
        pickled = archive.read(f"{root}/data.pkl").replace(name, b"p\x1b[2J\nsys\n")
    facts = read_vipant(raw_zip(path, pickled, stored)).facts
    assert facts["not_imported"] == [r"p\x1b[2J.sys"]
    assert json.dumps(facts)


def raw_zip(path: Path, data: bytes, storages: Mapping[str, bytes] | None = None, method: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, value in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", value)
    return path


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    "target",
    [
        named("collections", "OrderedDict"),
        named("torch._utils", "_rebuild_tensor_v2"),
        named("torch", "FloatStorage"),
        named("os", "system"),
        named("collections", "OrderedDict") + b")R",
        named("os", "system") + b")R",
        named("os", "system") + b")\x81",
    ],
)
def test_a_pickle_cannot_alter_what_stands_for_its_names(tmp_path: Path, target: bytes) -> None:
    before = [dict(vars(c)) for c in (_Dict, _Tensor, _Inert)]
    state = b"}X\x01\x00\x00\x00aK\x01s"  # {"a": 1}
    for build in (state + b"b", b"N" + state + b"\x86b", state + b"0K\x01K\x02s", b"K\x01a", b"(K\x01e"):
        data = b"\x80\x02" + target + build + b"."
        with pytest.raises(DataError):
            read_vipant(raw_zip(tmp_path / "v.pth", data))
    assert [dict(vars(c)) for c in (_Dict, _Tensor, _Inert)] == before


def test_a_name_that_others_registered_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "system", 1)
    try:
        assert pickle.loads(pickle.dumps(os.system, 2)) is os.system  # and is remembered: find_class is not asked again
        with pytest.raises(DataError, match="extension code"):
            read_vipant(raw_zip(Path("v.pth"), b"\x80\x02\x82\x01X\x09\x00\x00\x00touch ran\x85R."))
    finally:
        copyreg.remove_extension("posix", "system", 1)
    assert not Path("ran").exists()


def test_a_pickle_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    for data, words in (
        (b"\x80\x02Nr\xff\xff\xff\xff.", "memo number 4294967295"),
        (b"\x80\x02Np4000000000\n.", "memo number 4000000000"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "read safely"),  # a bytearray of 1 TiB
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62) + b"x.", "read safely"),  # a string
    ):
        with pytest.raises(DataError, match=words):
            read_vipant(raw_zip(tmp_path / "v.pth", data))
        (tmp_path / "v.pth").write_bytes(data)  # the same as torch before 1.6 would have it
        with pytest.raises(DataError, match=words):
            read_vipant(tmp_path / "v.pth")
    bomb = pickle.dumps(b"\0" * 1_000_000)
    with pytest.raises(DataError, match="compressed"):
        read_vipant(raw_zip(tmp_path / "v.pth", bomb, method=zipfile.ZIP_DEFLATED))


class Lie:
    """A tensor declared by hand."""

    def __init__(self, size: Any, stride: Any, offset: Any = 0, numel: Any = 1024, key: Any = "0", *view: Any) -> None:
        self.declared = (Memory(key, numel, *view), offset, size, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.declared


class Memory:
    def __init__(self, key: Any, numel: Any, *view: Any) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", numel, *view)


class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Memory) else None


def lying(path: Path, lie: Lie, stored: bytes = bytes(4096)) -> Path:
    """A checkpoint whose proj is declared so."""
    head = {"post_encoder.proj": lie}
    with open(path.with_suffix(".pkl"), "wb") as f:
        Pickler(f, 2).dump(checkpoint(head, {}))
    return raw_zip(path, path.with_suffix(".pkl").read_bytes(), {"0": stored})


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (Lie((64, 17), (17, 1)), r"declared as \(64, 17\) from 0, beyond the 1024 numbers"),
        (Lie((64, 16), (16, 1), offset=1), "from 1, beyond"),
        (Lie((64, 16), (17, 1)), "beyond"),
        (Lie((10**9, 10**9), (0, 0)), "beyond"),
        (Lie((10**12,), (1,), numel=10**12), "more than the file has"),
        (Lie((64, 16), (16, -1)), "no possible shape"),
        (Lie((64, 0), (1, 1)), "no possible shape"),
        (Lie((64, 16), (16, 1), offset=-1), "no possible shape"),
        (Lie((64, 16.0), (16, 1)), "no possible shape"),
        (Lie((True, 16), (16, 1)), "no possible shape"),
        (Lie((64, 16), (16,)), "no tensor"),
        (Lie((64, 16), (16, 1), numel="1024"), "no storage"),
        (Lie((64, 16), (16, 1), key=0), "no storage"),
        (Lie((64, 16), (16, 1), 0, 1024, "0", ("1", 0, 1024)), "view of another"),
    ],
)
def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path, lie: Lie, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_vipant(lying(tmp_path / "v.pth", lie))


def test_a_storage_shorter_than_declared_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "v.pth", checkpoint(as_vipant(tower().vit)))
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        data = archive.read(f"{root}/data.pkl")
        keys = [n.rsplit("/", 1)[1] for n in archive.namelist() if "/data/" in n]
        stored = {k: archive.read(f"{root}/data/{k}") for k in keys}
    assert read_vipant(raw_zip(path, data, stored)).facts["layers"] == 2
    with pytest.raises(DataError, match=r"storage \d+ is \d+ bytes"):
        read_vipant(raw_zip(path, data, {k: v[:-4] + bytes(8) for k, v in stored.items()}))
    with pytest.raises(DataError, match="no item named"):
        read_vipant(raw_zip(path, data, {**{k: stored[k] for k in keys[1:]}, "padding": bytes(1 << 20)}))
    old = write(path, checkpoint(as_vipant(tower().vit)), legacy=True)
    position = old.read_bytes().rindex(struct.pack("<q", 64 * 16))  # the elements of proj
    data = bytearray(old.read_bytes())
    data[position] ^= 1
    old.write_bytes(data)
    with pytest.raises(DataError, match="not as long as declared"):
        read_vipant(old)


def test_files_of_other_machines_and_formats_are_refused(tmp_path: Path) -> None:
    path, head = tmp_path / "v.pth", as_vipant(tower().vit)
    old = write(path, checkpoint(head), legacy=True).read_bytes()
    for was, now, words in (
        (b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47", "neither of torch's formats"),  # the magic number
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
    ):
        assert old.count(was) == 1
        path.write_bytes(old.replace(was, now))
        with pytest.raises(DataError, match=words):
            read_vipant(path)
    new = write(path, checkpoint(head)).read_bytes()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "big.pth", "w") as other:
        for info in archive.infolist():
            data = b"big" if info.filename.endswith("/byteorder") else archive.read(info)
            other.writestr(info.filename, data)
    with pytest.raises(DataError, match="big-endian"):
        read_vipant(tmp_path / "big.pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    assert path.read_bytes() != new
    with pytest.raises(DataError, match=r"a zip with 2 data\.pkl"):
        read_vipant(path)


def test_a_file_of_more_layers_than_any_tower_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    real = vipant_module.AudioViT
    monkeypatch.setattr(vipant_module, "AudioViT", lambda **shape: built.append(shape["layers"]) or real(**shape))
    head = {f"encoder.resblocks.{i}.x": torch.zeros(1) for i in range(500)}
    with pytest.raises(DataError, match=r"and \d+ more"):
        read_vipant(write(tmp_path / "v.pth", checkpoint(head)))
    assert built == [64]
