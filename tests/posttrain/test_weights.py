"""How weights travel: nothing but the bytes, and all of them."""

from __future__ import annotations

import errno
import os
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.weights import SHM, FolderOutlet, HeldOutlet, SharedWeights, fingerprint, read_into, state_of
from tests.posttrain.tiny import make_model, trainer_of


class Mixed(nn.Module):
    """Everything a model may hold: tied weights, several types, a scalar counter, an empty buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=True)
        self.coarse = nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16))
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.randint(-9, 9, (4, 3), generator=generator))
        self.register_buffer("steps", torch.tensor(seed))
        self.register_buffer("flags", torch.rand(5, generator=generator) > 0.5)
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("view", torch.randn(6, 2, generator=generator).T)
        self.register_buffer("scratch", torch.randn(2, generator=generator), persistent=False)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit, NaN and signed zero included."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].contiguous().reshape(-1).view(torch.uint8).equal(b[k].contiguous().reshape(-1).view(torch.uint8))
        for k in a
    )


def test_a_state_holds_tied_weights_once_and_no_scratch() -> None:
    names = ["coarse", "table", "steps", "flags", "nothing", "view", "embed.weight", "head.bias"]
    assert list(state_of(Mixed(0))) == names


def test_shared_weights_arrive_bit_for_bit() -> None:
    source, target = Mixed(1), Mixed(2)
    source.coarse.data[0, 0], source.coarse.data[0, 1] = float("nan"), -0.0
    assert not same(state_of(source), state_of(target))
    shared = SharedWeights(state_of(source))
    shared.write(state_of(source))
    read_into(target, SHM + shared.name)
    assert same(state_of(source), state_of(target))
    assert target.head.weight is target.embed.weight
    shared.write(state_of(Mixed(3)))  # a block is written again and again
    read_into(target, SHM + shared.name)
    assert same(state_of(Mixed(3)), state_of(target))
    shared.close()


@pytest.mark.parametrize("kind", ["longcat2", "llama"])
def test_a_folder_arrives_bit_for_bit(kind: str, tmp_path: Path) -> None:
    source, target = make_model(kind, seed=1), make_model(kind, seed=2)
    source.save_pretrained(tmp_path)
    read_into(target, str(tmp_path))
    assert same(state_of(source), state_of(target))


def test_folders_that_a_killed_process_left_go_as_if_they_were_this_ones(tmp_path: Path) -> None:
    """It had put versions 3 to 12, and a checkpoint at 10 goes on."""
    root = tmp_path / "weights"
    policy = trainer_of(make_model("llama"))
    for version in (9, 12):
        policy.version = version
        FolderOutlet(root).put(policy)
    (root / "vllm-0.log").touch()
    outlet = FolderOutlet(root, last=2)
    there: list[list[str]] = []
    for version in (10, 11, 12, 13):
        policy.version = version
        outlet.put(policy)
        there.append(sorted(p.name for p in root.glob("v[0-9]*")))
    assert there == [["v10", "v12"], ["v10", "v11"], ["v11", "v12"], ["v12", "v13"]]
    outlet.close()
    assert [p.name for p in root.iterdir()] == ["vllm-0.log"]


def test_close_removes_the_block_once_and_only_by_its_maker() -> None:
    state = state_of(Mixed(1))
    shared = SharedWeights(state)
    shared.write(state)
    other = SharedWeights(state, name=shared.name)
    other.close()
    third = Mixed(2)
    read_into(third, SHM + shared.name)
    assert same(state_of(third), state)
    shared.close()
    shared.close()
    with pytest.raises(FileNotFoundError):
        SharedMemory(name=shared.name)


def test_a_fingerprint_changes_if_and_only_if_the_weights_do() -> None:
    first = fingerprint(Mixed(1))
    assert fingerprint(Mixed(1)) == first
    assert len(first) == 16
    moved = Mixed(1)
    moved.get_buffer("scratch").add_(1)  # not a weight
    assert fingerprint(moved) == first
    seen = {first}
    for name, tensor in state_of(Mixed(1)).items():
        changed = Mixed(1)
        target = state_of(changed)[name]
        if tensor.numel():
            first_entry = (0,) * target.ndim
            target[first_entry] = ~target[first_entry] if target.dtype == torch.bool else target[first_entry] + 1
            seen.add(fingerprint(changed))
    assert len(seen) == len(state_of(Mixed(1)))  # each of them, but the empty one, and the first


def test_a_fingerprint_knows_names() -> None:
    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.register_buffer(name, torch.ones(2))

    assert fingerprint(Named("a")) != fingerprint(Named("b"))


@pytest.mark.faults
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is elsewhere on this system")
def test_memory_that_is_not_to_be_had_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not by a bus error at the first write; and nothing is left behind."""

    made: list[Path] = []

    def full(fd: int, offset: int, length: int) -> None:
        made.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"^/dev/shm: there is no room for 3 MiB of weights"):
        SharedWeights({"w": torch.zeros(3 << 18)})
    # Its own block alone: others on this machine come and go.
    assert [block.parent for block in made] == [Path("/dev/shm")] and not made[0].exists()

    def unknown(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not on this file system")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    SharedWeights({"w": torch.zeros(3)}).close()


def test_held_weights_are_copies_of_the_last_versions_as_they_would_be_saved(tmp_path: Path) -> None:
    model = make_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    trainer = trainer_of(model)
    trainer.save_policy(tmp_path)
    outlet = HeldOutlet(last=2)
    first = outlet.put(trainer)
    held = dict(HeldOutlet.held(first))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    saved = load_file(tmp_path / "model.safetensors")
    assert held.keys() == saved.keys() and any(".experts.3.down_proj" in name for name in held)
    assert all(held[name].equal(saved[name]) for name in held)
    for version in (1, 2):
        trainer.version = version
        where = outlet.put(trainer)
        assert {t.abs().max().item() for _, t in HeldOutlet.held(where)} == {0.0}
    with pytest.raises(KeyError):
        HeldOutlet.held(first)
    outlet.close()
    outlet.close()
    with pytest.raises(KeyError):
        HeldOutlet.held(where)


def test_held_weights_may_be_rounded_to_what_the_engine_computes_in() -> None:
    trainer = trainer_of(make_model("llama"))
    outlet = HeldOutlet(dtype=torch.bfloat16)
    held = dict(HeldOutlet.held(outlet.put(trainer)))
    outlet.close()
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    assert all(held[name].equal(t.to(torch.bfloat16)) for name, t in trainer.weights().items())
