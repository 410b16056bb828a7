"""Several workers on one study: actors of Ray, on this machine's GPUs or cores or on a cluster's.

Ray starts the workers, hands work to whichever is free, and says when one dies. Each worker checks the study as this
process did, which must give the same hashes, and loads the base model with all adapters once. This process loads none;
it sends sensitivities along, takes what comes back, and alone writes to the study's folder.

Whichever worker fails, the study ends: what was kept stays, and the next run goes on from there.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_surgery.errors import InputError, RunError, SpectralSurgeryError, combine
from spectral_surgery.options import ModelOptions

if TYPE_CHECKING:
    from spectral_surgery.measurement import Measurement
    from spectral_surgery.sweeping.bench import Result, Work
    from spectral_surgery.sweeping.grid import Item
    from spectral_surgery.sweeping.preparing import Ready
    from spectral_surgery.sweeping.study import Study

AGAIN = "What was done is kept; run the same command again to go on from there."


@dataclass(frozen=True)
class WorkerOptions:
    """How many processes share the work, and where they are."""

    workers: int = 1
    """Processes that share the work, each with the base model and a GPU of its own, or its share of the CPU cores.
    More than one are workers of Ray: pip install 'spectral-surgery[ray]'."""
    ray_address: str | None = None
    """Ray cluster that the workers are on, such as auto; by default the one in RAY_ADDRESS, else this machine."""

    @property
    def by_ray(self) -> bool:
        """Whether other processes do the work."""
        return self.workers > 1 or self.ray_address is not None


def check_workers(options: WorkerOptions, model: ModelOptions) -> None:
    """Checks what can be known before Ray starts.

    Raises:
        InputError: Whatever is wrong, all of it together.
    """
    faults = []
    if options.workers < 1:
        faults.append(f"--workers is {options.workers}; expected 1 or more.")
    if options.by_ray and importlib.util.find_spec("ray") is None:
        faults.append("The package ray is not installed. Run: pip install 'spectral-surgery[ray]'")
    if options.by_ray and ":" in (model.device or ""):
        faults.append(f"--device {model.device} is one device, and every worker gets its own. Leave the number out.")
    if options.by_ray and model.device_map:
        faults.append(
            f"--device-map {model.device_map} spreads one model over several devices, and every worker has one. Use "
            f"one process (--workers 1), or leave it out."
        )
    if options.by_ray and not _answers(_address(options)):
        faults.append(f"Nothing answers at {_address(options)}. Correct --ray-address, or start Ray there.")
    combine(faults)


def _address(options: WorkerOptions) -> str:
    return options.ray_address or os.environ.get("RAY_ADDRESS") or "local"


def _answers(address: str) -> bool:
    """Returns whether something listens at HOST:PORT; Ray itself would try for many minutes. Names count as true."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return True
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


class Worker:
    """What each of Ray's processes holds."""

    def prepare(self, study: Study, items: Sequence[Item], folder: str, command: list[str]) -> list[str]:
        """Returns the hashes of all scores of a study, checked as in the process that was given the command.

        Args:
            study: What is run.
            items: Which of its runs.
            folder: What relative paths are from.
            command: What sensitivities are recorded to come from.

        Raises:
            InputError: If this machine does not have the folder, or something is wrong with the study here.
        """
        from spectral_surgery.sweeping.preparing import prepare_study

        if not Path(folder).is_dir():
            raise InputError(f"A worker does not see the folder {folder}. Every machine must see the same files.")
        os.chdir(folder)
        sys.argv[:] = command
        self.ready = prepare_study(study, items)
        return sorted(self.ready.scores.values())

    def load(self) -> None:
        """Loads the base model with all adapters."""
        from spectral_surgery.sweeping.bench import Bench

        self.bench = Bench.load(self.ready)

    def do(self, number: int, work: Work, measured: Measurement | None) -> tuple[int, Result]:
        """Returns what came of a piece of work, with the number by which it is known."""
        return number, self.bench.do(work, measured)


@contextmanager
def hired(ready: Ready, options: WorkerOptions) -> Iterator[Callable[..., Iterator[tuple[Work, Result]]]]:
    """Opens workers that have loaded the model, as what does work; closes them at the end.

    Raises:
        InputError: If there are not as many GPUs or cores as workers, or a worker sees other files.
        RunError: If a worker fails or dies.
    """
    import ray
    from ray.util import ActorPool

    with connected(_address(options)), _failures():
        resources = share(ray.nodes(), options.workers, ready.study.model)
        workers = [ray.remote(**resources)(Worker).remote() for _ in range(options.workers)]
        told = (ready.study, list(ready.items), os.getcwd(), sys.argv)
        seen = ray.get([worker.prepare.remote(*told) for worker in workers])
        if any(found != sorted(ready.scores.values()) for found in seen):
            raise InputError(
                "A worker finds other adapters, rows, base model or package versions than this process. Every machine "
                "must see the same files and have the same packages."
            )
        ray.get([worker.load.remote() for worker in workers])

        def do(works: Sequence[Work], measured: Callable[[Item], Measurement | None]) -> Iterator[tuple[Work, Result]]:
            sent: dict[int, Any] = {}

            def start(worker: Any, number: int) -> Any:
                found = None if works[number].measures else measured(works[number].item)
                if found is not None and id(found) not in sent:
                    sent[id(found)] = ray.put(found)
                return worker.do.remote(number, works[number], sent.get(id(found)))

            for number, result in ActorPool(workers).map_unordered(start, range(len(works))):
                yield works[number], result

        yield do


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects to a Ray cluster or starts Ray on this machine, without telemetry and dashboard; ends it afterwards.

    Where this process has called ``ray.init`` already, that is used, and left as it is.

    Raises:
        InputError: If there is no such cluster.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"Ray cannot be reached at {address} ({error}). Correct --ray-address.") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _failures() -> Iterator[None]:
    """Says in a sentence what became of a worker."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SpectralSurgeryError):
            raise cause from error
        raise RunError(f"A worker failed ({type(cause).__name__}: {cause}). {AGAIN}") from error
    except RayError as error:
        lines = str(error).strip().splitlines()
        raise RunError(f"A worker died ({lines[-1][:300]}). {AGAIN}") from error


def share(nodes: Sequence[dict[str, Any]], workers: int, model: ModelOptions) -> dict[str, int]:
    """Returns what Ray reserves for each worker: a GPU where there are any, else as many cores as all can have.

    Args:
        nodes: Ray's machines with their resources.
        workers: How many there are to be.
        model: Where the base model is to be loaded.

    Raises:
        InputError: If there are fewer GPUs or cores than workers.
    """
    gpus, cores = ([int(node["Resources"].get(kind, 0)) for node in nodes if node["Alive"]] for kind in ("GPU", "CPU"))
    if sum(gpus) and model.device != "cpu":
        if sum(gpus) < workers:
            raise InputError(f"--workers is {workers}, and Ray has {sum(gpus)} GPUs, one for a worker. Lower it.")
        return {"num_gpus": 1, "num_cpus": 0}
    fitting = [each for each in range(1, max(cores, default=0) + 1) if sum(n // each for n in cores) >= workers]
    if not fitting:
        raise InputError(f"--workers is {workers}, and Ray has {sum(cores)} CPU cores, one for a worker. Lower it.")
    return {"num_cpus": max(fitting)}
