"""Run the project as a program: ``python -m sce_pipeline`` takes the options of ``kedro run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from kedro.config import MissingConfigException
from kedro.framework.cli.utils import find_run_command
from kedro.framework.project import configure_project


def main(*args: Any, **kwargs: Any) -> Any:
    """Run the project's pipelines with the command line's options.

    Raises:
        SystemExit: There is no configuration, which a wheel does not bring.
    """
    package_name = Path(__file__).parent.name
    configure_project(package_name)
    run = find_run_command(package_name)
    kwargs["standalone_mode"] = not hasattr(sys, "ps1")
    try:
        return run(*args, **kwargs)
    except MissingConfigException as error:
        sys.exit(
            f"{error}. Say with --conf-source where the configuration is: a folder, or the archive "
            f"conf-{package_name}.tar.gz that kedro package writes beside the wheel; --env is a "
            "folder in it"
        )


if __name__ == "__main__":
    main()
