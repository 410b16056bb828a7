"""One dataclass a command: its fields are the options, its docstring the help, its ``run`` one library call.

Nothing here imports torch or transformers until a command runs. All faults that can be known before a base model loads
are found together and reported in one message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from spectral_surgery import policies, processes
from spectral_surgery.cli import console
from spectral_surgery.constraints import Constraint
from spectral_surgery.errors import InputError, combine
from spectral_surgery.formats import DataOptions
from spectral_surgery.options import BatchOptions, ModelOptions
from spectral_surgery.selection import Selection

if TYPE_CHECKING:
    from spectral_surgery.adapter import Adapter
    from spectral_surgery.measurement import Measurement
    from spectral_surgery.measuring import Prepared
    from spectral_surgery.surgery import EditReport


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command has."""

    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> None:
        """Does it.

        Raises:
            SpectralSurgeryError: Whatever is wrong with the input, or fails midway.
        """
        raise AssertionError("each command has its own")


@dataclass(frozen=True, kw_only=True)
class OfAdapter(Command):
    """A command that reads one adapter."""

    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
    """Adapter folder or Hub id, or a kohya or diffusers .safetensors file."""
    adapter_revision: str | None = None
    """Branch, tag or commit of the adapter's Hub repository."""
    subfolder: str | None = None
    """Where inside the folder or repository the adapter lies, such as checkpoint-300."""

    def load(self) -> Adapter:
        """Returns the adapter.

        Raises:
            AdapterError: If it cannot be read or edited.
        """
        from spectral_surgery.adapter import Adapter

        return Adapter.load(self.adapter, revision=self.adapter_revision, subfolder=self.subfolder)


@dataclass(frozen=True, kw_only=True)
class Measuring(OfAdapter):
    """A command that may measure an adapter."""

    selection: Selection = field(default_factory=Selection)
    rows: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    batching: BatchOptions = field(default_factory=BatchOptions)

    def prepare(self, adapter: Adapter, data: str) -> Prepared:
        """Returns what a measurement needs except the base model's weights, and says what it will be.

        Raises:
            InputError: Whatever is wrong with modules, rows or base model.
        """
        from spectral_surgery.calibration import preview
        from spectral_surgery.measuring import prepare

        prepared = prepare(
            adapter,
            data,
            selection=self.selection,
            data_options=self.rows,
            model=self.model,
            batching=self.batching,
        )
        first = preview(prepared.tokenized.examples[0], prepared.tokenizer)
        print(f"Base model: {prepared.about['base_model']}")
        print(f"Modules: {len(prepared.paths)} of {len(adapter.updates)}, {_kinds(prepared.paths)}")
        most = "as many as it takes, at most " if prepared.until_sure else ""
        print(f"Measuring rows: {most}{len(prepared.examples)} ({prepared.tokenized.truncated} shortened to fit)")
        print(f"The first, its answer in [[ ]]: {first if len(first) <= 400 else f'... {first[-400:]}'}")
        return prepared

    def measure(self, prepared: Prepared, needs: Literal["ranking", "signs"] = "ranking") -> Measurement:
        """Loads the base model and returns the measurement; with --examples auto until what is needed is decided.

        Raises:
            RunError: If it fails midway.
        """
        from spectral_surgery.measuring import load_prepared, measure_prepared

        live = load_prepared(prepared)
        with console.progress("measuring", "rows") as progress:
            measured = measure_prepared(prepared, live, self.batching, needs=needs, progress=progress)
        if "looks" in measured.about:
            print(measured.about["looks"])
        return measured


@dataclass(frozen=True, kw_only=True)
class Measure(Measuring):
    """Measures how strongly the loss depends on every component, and saves it to a file.

    One forward and one backward pass per measuring row; every policy can then be computed from the file.
    """

    data: str
    """Measuring rows: a JSONL, JSON, CSV or Parquet file, a folder of them, or a data set's Hub id."""
    output: Path | None = None
    """File to write; by default ADAPTER.sensitivity.safetensors in this folder."""
    overwrite: bool = False
    """Replace an existing sensitivity file."""
    dry_run: bool = False
    """Check everything and say what would be done, without loading the base model's weights."""

    def run(self) -> None:
        """Writes the sensitivity file."""
        from spectral_surgery import sensitivity_file as file

        output = self.output or Path(f"{Path(self.adapter).name}.sensitivity.safetensors")
        adapter, _ = together(self.load, lambda: file.check_path(output, overwrite=self.overwrite))
        prepared = self.prepare(adapter, self.data)
        if self.dry_run:
            print(f"Would measure and write {output}.")
            return
        measured = self.measure(prepared)
        processes.of_first(lambda: file.save_measurement(measured, output, overwrite=self.overwrite))
        print(f"Measured {measured.examples} rows, mean loss {measured.losses.mean():.4f} nats per token.")
        print(
            f"Wrote {output}. Next: spectral-surgery edit {self.adapter} --sensitivity {output} --policy smooth_abs "
            f"--output {Path(self.adapter).name}-edited"
        )


@dataclass(frozen=True, kw_only=True)
class Edit(Measuring):
    """Edits an adapter by one policy, without judging the result, and writes a PEFT adapter folder.

    Policies that need sensitivities take them from a file, or measure first.
    """

    policy: Annotated[str, tyro.conf.arg(help=f"NAME or NAME:field=value,field=value.\n{policies.help_text()}")]
    output: Path
    """Folder to write."""
    sensitivity: Path | None = None
    """Sensitivity file that was measured on this adapter."""
    data: str | None = None
    """Measuring rows, in place of a sensitivity file."""
    energy: Literal["auto", "nuclear", "frobenius", "functional", "none"] = "auto"
    """What the edit keeps per module: sum of S, root of sum S^2, output energy on the measuring rows, or nothing; auto
    is the policy's own."""
    floor: float = 0.0
    """Edited singular values are at least this."""
    max_edit_size: float | None = None
    """Largest relative change of a module's update, such as 0.3."""
    overwrite: bool = False
    """Replace an output folder that spectral-surgery wrote."""
    dry_run: bool = False
    """Check everything and say what would be done, without measuring or writing."""

    def run(self) -> None:
        """Writes the edited adapter."""
        from spectral_surgery.adapter.saving import check_output
        from spectral_surgery.editing import edit
        from spectral_surgery.manifest import sensitivity_record

        policy, adapter, _, _ = together(
            lambda: policies.parse(self.policy),
            self.load,
            lambda: check_output(self.output, overwrite=self.overwrite, sources=(Path(self.adapter),)),
            self._check_source,
        )
        constraint = self._constraint(policy)
        measured = self._measurement(policy, adapter)
        if self.dry_run and self.data:
            print(f"Would measure, edit by {policies.spell(policy)} and write {self.output}.")
            return
        edited, report = edit(
            adapter,
            policy,
            measured,
            constraint=constraint,
            selection=self.selection,
            seed=self.rows.seed,
        )
        _say_edit(policy, constraint, report)
        if self.dry_run:
            print(f"Would write {self.output}.")
            return
        manifest = {
            "policy": policies.spell(policy),
            "constraint": vars(constraint),
            "seed": self.rows.seed,
            "measurement": dict(measured.about) if measured else None,
            "sensitivities": sensitivity_record(measured) if measured else {},
        }
        edited.save(self.output, overwrite=self.overwrite, manifest=manifest)
        print(
            f"Wrote {self.output}, read it back and verified it. "
            f"Back to the source: spectral-surgery restore {self.output}"
        )

    def _check_source(self) -> None:
        if self.sensitivity and self.data:
            raise InputError(
                "Both --sensitivity and --data are given. Pass one: the file is used, or rows are measured."
            )
        policy = policies.parse(self.policy)
        if policies.row(policy).needs == "sensitivity" and not (self.sensitivity or self.data):
            raise InputError(
                f"Policy {policies.row(policy).name} needs sensitivities. "
                f"Pass --data to measure on, or --sensitivity FILE."
            )

    def _constraint(self, policy: policies.Policy) -> Constraint:
        energy = policies.row(policy).energy if self.energy == "auto" else self.energy
        return Constraint(energy, self.floor, self.max_edit_size)

    def _measurement(self, policy: policies.Policy, adapter: Adapter) -> Measurement | None:
        if self.sensitivity:
            from spectral_surgery.sensitivity_file import load_measurement

            return load_measurement(self.sensitivity)
        if not self.data:
            return None
        prepared = self.prepare(adapter, self.data)
        needs: Literal["ranking", "signs"] = "signs" if policies.row(policy).name == "grad_direction" else "ranking"
        return None if self.dry_run else self.measure(prepared, needs)


@dataclass(frozen=True, kw_only=True)
class Restore(Command):
    """Names the adapter that a folder was made from, and checks by hash that it is still the same."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """A folder that spectral-surgery wrote."""
    output: Path | None = None
    """Also copy the source adapter to this new folder."""

    def run(self) -> None:
        """Prints where the source is."""
        from spectral_surgery.restoring import restore

        source = restore(self.folder, self.output)
        print(f"{self.folder} was made from {source}, which is unchanged (sha256 of its tensors agrees).")
        if self.output:
            print(f"Copied it to {self.output}.")


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Shows the whole of it on an embedded model, offline: refines an adapter that forgot, and says what was found."""

    output: Path = Path("spectral-surgery-demo")
    """Folder for verdict, report and the refined adapter."""
    overwrite: bool = False
    """Replace what an earlier demo left in the output folder."""

    def run(self) -> None:
        """Prints the verdict and how to repeat it."""
        from spectral_surgery.demo.run import run

        with console.stages() as progress:
            print(run(self.output, overwrite=self.overwrite, progress=progress))


def together(*checks: Callable[[], Any]) -> list[Any]:
    """Returns the results of all checks, or raises one error that names every fault.

    Raises:
        InputError: If any check raises one.
    """
    faults, results = [], []
    for check in checks:
        try:
            results.append(check())
        except InputError as error:
            faults.append(str(error))
    combine(list(dict.fromkeys(faults)))
    return results


def _say_edit(policy: policies.Policy, constraint: Constraint, report: EditReport) -> None:
    gates = [gate for module in report.modules.values() for gate in module.gates]
    kept = "" if constraint.energy == "none" else f", keeping {constraint.energy} energy"
    print(
        f"Policy {policies.spell(policy)}{kept}: {report.edited} of "
        f"{report.components} components in {len(report.modules)} modules edited, gates {min(gates):.3g} to "
        f"{max(gates):.3g}, relative size of the edit {report.size:.3g}."
    )
    if report.drowned:
        print(
            f"warning: in {len(report.drowned)} modules the edit is less than five times the rounding of the stored "
            f"dtype, the first is {report.drowned[0]}.",
            file=sys.stderr,
        )


def _kinds(paths: list[str]) -> str:
    from spectral_surgery.selection import kind

    return ", ".join(dict.fromkeys(map(kind, paths)))
