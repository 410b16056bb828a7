"""Who does what among several processes: dealing out, agreeing, failing together, and what is refused."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import launched
import pytest
import tiny
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from spectral_surgery import processes
from spectral_surgery.cli import main
from spectral_surgery.errors import BaseModelError, InputError
from spectral_surgery.live import Live

SCRIPT = textwrap.dedent(
    """
    import torch
    from spectral_surgery import processes
    from spectral_surgery.errors import InputError, RunError

    me = processes.rank()
    assert processes.count() == 2 and processes.device() == "cpu"
    assert processes.dealt(range(5), list) == [[0, 2, 4], [1, 3]]
    assert processes.dealt([7], list) == [[7]] and processes.dealt([], list) == []
    assert processes.dealt("ab", lambda share: processes.count()) == [1, 1]
    assert processes.of_first(lambda: (me, processes.count())) == (0, 1)
    assert [t.tolist() for t in processes.summed([torch.tensor([1.0, me]), torch.ones(1)])] == [[2, 1], [2]]

    def fails(share):
        if share == [1]:
            raise RunError("one row is bad")
        return share

    def say(what):
        # In one write: launched unbuffered, both processes have the same pipe.
        print(f"{me} {what}\\n", end="", flush=True)

    for work in (lambda: processes.dealt([0, 1], fails), lambda: processes.of_first(lambda: 1 / 0)):
        try:
            work()
        except (RunError, ZeroDivisionError) as error:
            say(f"{type(error).__name__}: {error}")
    try:
        processes.check("cuda:0", None)
    except InputError as error:
        say(error)
    processes.check("cpu", None)
    if me:
        raise SystemExit(7)
    processes.of_first(lambda: None)
    processes.dealt([1, 2], list)
    """
)


@pytest.mark.slow
def test_two_processes_agree_fail_together_and_do_not_wait_for_one_that_ended(tmp_path: Path) -> None:
    done = launched.script(SCRIPT, tmp_path)
    assert sorted(done.stdout.splitlines()) == [
        "0 --device cuda:0 is one device for 2 processes, and accelerate gives this one cpu. Leave --device out; "
        "ACCELERATE_USE_CPU=true in the environment keeps to the CPU.",
        "0 RunError: Process 1 of 2 failed: one row is bad",
        "0 ZeroDivisionError: division by zero",
        "1 --device cuda:0 is one device for 2 processes, and accelerate gives this one cpu. Leave --device out; "
        "ACCELERATE_USE_CPU=true in the environment keeps to the CPU.",
        "1 RunError: The first process failed: ZeroDivisionError: division by zero.",
        "1 RunError: one row is bad",
    ], done.stderr[-3000:]
    assert done.returncode != 0


def test_one_process_needs_no_others() -> None:
    assert processes.dealt([1, 2], sum) == [3]
    assert processes.dealt([], sum) == []
    assert processes.of_first(lambda: 5) == 5
    processes.check("cuda:1", "auto")


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallel"),
    ],
)
def test_one_model_over_several_processes_is_refused_by_name(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"accelerate is configured for .*{name}"):
        processes.check(None, None)
    monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=r"--device-map auto spreads one model .* 2 processes were started"):
        processes.check(None, "auto")


@pytest.mark.parametrize("command", ["measure", "refine", "evaluate"])
def test_the_commands_refuse_a_device_map_in_several_processes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world = tiny.world(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = ["--suite", str(world.data)] if command == "evaluate" else ["--data", str(world.data)]
    output = ["--output", str(tmp_path / "out")]
    assert main([command, str(world.adapter), *given, *output, "--device-map", "auto"]) == 2
    assert "--device-map auto spreads one model over the devices, and 2 processes" in capsys.readouterr().err


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["inspect", "nowhere"]) == 2
    assert "inspect works in one process, and 2 were started" in capsys.readouterr().err


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_model_that_is_spread_over_processes_is_refused_by_name(mesh: DeviceMesh) -> None:
    model = tiny.lora(tiny.llama())
    parallelize_module(model.get_base_model().model.layers[0].mlp, mesh, {"gate_proj": ColwiseParallel()})
    with pytest.raises(BaseModelError, match=r"FSDP or tensor parallelism \(.*mlp\.gate_proj\.weight is a DTensor\)"):
        Live(model)
    model = tiny.lora(tiny.llama())
    fully_shard(model.get_base_model().model.layers[1], mesh=mesh)
    with pytest.raises(BaseModelError, match=r"layers\.1\..* is in FSDP|layers\.1\..* is a DTensor"):
        Live(model)
