"""The two passes of `prepare` as Apache Beam pipelines, for corpora that are too large for one machine.

The first pass reads each unit and groups its documents by bucket, which is the runner's shuffle; the second makes each
bucket a shard. Between them a bucket is one file of the working directory, so that no worker holds more than one, and
a pipeline that was killed makes what is missing: the first pass anew, unless it was done, and of the second the rest.
"""

import contextlib
import io
import logging
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import apache_beam
from apache_beam import pvalue
from apache_beam.options import pipeline_options
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import PipelineRunner, PipelineState, create_runner
from etils import epath

from lmboost import places
from lmboost.data import buckets as buckets_lib
from lmboost.data import records, sources, unfinished
from lmboost.errors import UserError, nearest

_REFUSED = "refused.json"
_DONE = "done.json"  # in spread/: the first pass is done, and its tally
_QUIET = {"DirectRunner": ("--default_sdk_harness_log_level=CRITICAL",)}


class Beam:
    """`prepare.Passes` by one of Beam's runners."""

    name = "beam"

    def __init__(self, runner: str, options: str, report: Callable[[str], None]):
        self._runner, self._report = runner, report
        if runner == "DirectRunner":  # what is wrong comes as an error, and need not be logged before
            logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        self._options = _options(runner, options)

    def spread(self, partial: epath.Path, units: Sequence[sources.Unit], plan: Mapping, most: int) -> dict:
        partial = epath.Path(partial)
        done = partial / "spread" / _DONE
        if not done.exists():
            counted = partial / "spread" / "counted.json"
            with self._pipeline(partial, "read") as pipeline:
                tasks = pipeline | apache_beam.Create(list(enumerate(units))) | apache_beam.Reshuffle()
                read = tasks | "Read" >> apache_beam.FlatMap(_read, os.fspath(partial), plan, most).with_outputs(
                    "tally", main="placed"
                )
                grouped = read.placed | apache_beam.GroupByKey()
                grouped | "Keep" >> apache_beam.Map(_keep, os.fspath(partial))
                tally = read.tally | apache_beam.CombineGlobally(buckets_lib.merged)
                tally | "Count" >> apache_beam.Map(_write_json, os.fspath(counted))
            records.write_json(done, unfinished.read(counted, buckets_lib.TALLY))
        return unfinished.read(done, buckets_lib.TALLY)

    def bucket(self, partial: epath.Path, bucket: int) -> list[bytes]:
        return _bucket(epath.Path(partial), bucket)

    def make(self, partial: epath.Path, plan: Mapping) -> None:
        partial = epath.Path(partial)
        there = {path.name for path in (partial / "shards").glob("*.json")}
        missing = [i for i in range(sum(plan["buckets"])) if buckets_lib.done(partial, i).name not in there]
        if missing:
            with self._pipeline(partial, "tokenised") as pipeline:
                tasks = pipeline | apache_beam.Create(missing) | apache_beam.Reshuffle()
                tasks | "Make" >> apache_beam.Map(_make, os.fspath(partial), plan)

    @contextlib.contextmanager
    def _pipeline(self, partial: epath.Path, done: str) -> Iterator[apache_beam.Pipeline]:
        """A pipeline that has run when the block ends.

        Raises a UserError where a worker has refused something, and where it did not begin or was ended from outside.
        """
        refused = partial / _REFUSED
        refused.unlink(missing_ok=True)
        pipeline = apache_beam.Pipeline(_runner(self._runner, self._options), self._options)
        yield pipeline
        try:
            running = pipeline.run()
        except Exception as error:  # of networks and of what is to be fetched, each has its own
            if self._runner == "DirectRunner":  # this was the run
                raise
            raise UserError(
                f"--runner={self._runner} does not begin ({places.brief(error)}): mend --beam_options or what it names."
            ) from error
        state = running.wait_until_finish()
        if refused.exists():
            raise UserError(unfinished.read(refused, {"message": str})["message"])
        if state != PipelineState.DONE:
            raise UserError(f"{self._runner} has ended the pipeline as {state}: run the same command again to go on.")
        self._report(f"{self._runner} has {done} all parts")


def _options(runner: str, given: str) -> pipeline_options.PipelineOptions:
    """The runner's options; a UserError for flags that Beam does not know, or not with such values.

    What Flink and Spark know is known to their servers, which say so when the pipeline is sent.
    """
    said = io.StringIO()
    try:
        flags = shlex.split(given)
        with contextlib.redirect_stderr(said):
            options = pipeline_options.PipelineOptions([f"--runner={runner}", *_QUIET.get(runner, ()), *flags])
            known = options.get_all_options()
            unknown = sorted(set(options.get_all_options(retain_unknown_options=True)) - set(known))
    except (ValueError, SystemExit) as error:  # of quotes that do not end, and of argparse
        why = said.getvalue().strip().rpartition("error: ")[2] or error
        raise UserError(f"beam_options={given!r} can't be read: {why}. Expected flags such as '--a=b --c'.") from error
    if options.view_as(pipeline_options.StandardOptions).runner != runner:
        raise UserError(f"beam_options={given!r} names another runner than --runner={runner}: leave it out there.")
    if runner in ("DirectRunner", "DataflowRunner"):
        wrong = [f"--{name}{nearest(name, known)}" for name in unknown]
        wrong += [repr(flag) for flag in flags if not flag.startswith("--")]
        if wrong:
            raise UserError(
                f"beam_options={given!r}: {wrong[0]} is no flag of {runner}. Expected flags such as '--NAME=VALUE', as "
                "Beam's documentation has them."
            )
    if missing := PipelineOptionsValidator(options, create_runner(runner)).validate():
        raise UserError(f"beam_options={given!r}: {runner} says: {' '.join(missing)}")
    return options


def _runner(name: str, options: pipeline_options.PipelineOptions) -> str | PipelineRunner:
    """The runner; for DirectRunner the one in Python, as it would download one in Go first."""
    if name != "DirectRunner":
        return name
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    provision = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(provision))


def _kept(partial: epath.Path, bucket: int) -> epath.Path:
    return partial / "spread" / f"{bucket:06d}.bin"


def _bucket(partial: epath.Path, bucket: int) -> list[bytes]:
    path = _kept(partial, bucket)
    return records.read_run(path, 0, path.stat().length) if path.exists() else []  # a small corpus has empty ones


def _write_json(content: dict, path: str) -> None:
    records.write_json(epath.Path(path), content)


def _read(numbered: tuple[int, sources.Unit], directory: str, plan: Mapping, most: int) -> Iterator:
    """The documents of a unit, each with its bucket, and last their tally."""
    with _working(directory) as partial:
        if partial:
            counted = buckets_lib.tally()
            yield from buckets_lib.placed(*numbered, plan, most, counted)
            yield pvalue.TaggedOutput("tally", counted)


def _keep(grouped: tuple[int, Iterable[bytes]], directory: str) -> None:
    """Writes a bucket's documents, in some order."""
    bucket, raws = grouped
    with _working(directory) as partial:
        if partial:
            records.write_run(_kept(partial, bucket), [list(raws)])


def _make(bucket: int, directory: str, plan: Mapping) -> None:
    with _working(directory) as partial:
        if partial:
            buckets_lib.make_once(partial, bucket, lambda: _bucket(partial, bucket), plan)


@contextlib.contextmanager
def _working(directory: str) -> Iterator[epath.Path | None]:
    """The working directory; None where a worker has refused something, so that all come to an end.

    A UserError is left there for the process that waits for the pipeline. Raised here, a runner would try again and
    again, and bury it in its log.
    """
    partial = epath.Path(directory)
    try:
        with records.disk_errors(partial):
            yield None if (partial / _REFUSED).exists() else partial
    except UserError as error:
        records.write_json(partial / _REFUSED, {"message": str(error)})
