"""The command line on a machine whose ceilings nobody measures, which would take seconds.

python -m without_ceilings VERB ...
"""

from collections.abc import Mapping

from msgspec.structs import replace

from resblock_bench.bench.cli.main import main
from resblock_bench.bench.machine.process import Processes
from resblock_bench.bench.measure.survey import SurveyJob, survey
from resblock_bench.bench.records import Environment
from resblock_bench.bench.sweep import engines


def _surveyed(
    processes: Processes, job: SurveyJob, variables: Mapping[str, str] | None = None
) -> Environment:
    return survey(processes, replace(job, ceilings=False), variables)


if __name__ == "__main__":
    engines.survey = _surveyed
    main()
