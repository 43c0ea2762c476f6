"""``python -m dpfa_verification [NAME...] [--quick | --full] [--json]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from dpfa_core.errors import PluginError
from dpfa_verification.conformance import render, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every obligation held, 1 if one failed, 2 for a name that is not installed or bad usage."""
    parser = argparse.ArgumentParser(prog="python -m dpfa_verification", description="Check installed plugins.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="plugins to check; none means all")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="level", action="store_const", const="quick", help="seconds")
    depth.add_argument("--full", dest="level", action="store_const", const="full", help="minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        reports = verify(options.names, options.level or "default")
    except PluginError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    ok = all(report.ok for report in reports)
    if options.json:
        sys.stdout.write(json.dumps({"ok": ok, "reports": [report.to_json() for report in reports]}) + "\n")
    else:
        sys.stdout.write("\n\n".join(render(report) for report in reports) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
