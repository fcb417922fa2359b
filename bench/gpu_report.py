"""The result file of bench/gpu_check.sh, made anew after each of its steps from what they have left so far.

    python -m bench.gpu_report WORK RESULTS

WORK holds machine.json, `steps` (a line each: name, exit status, seconds), and where a step came so far proof.json
(`deftcore gpu-check --json`), static.json (bench.cuda_static), tests.xml (pytest) and figures.json (bench). Writes
RESULTS/<device>.json. Ends with 1 where a step or a test failed.
"""

import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from deftcore._files import write_json


def read(path):
    """What a JSON file says; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def outcomes(path):
    """{test: "passed", "failure", "error" or "skipped"} of pytest's XML."""
    try:
        cases = xml.parse(path).getroot().iter("testcase")
    except (OSError, xml.ParseError):
        return {}
    bad = ("failure", "error", "skipped")
    return {case.get("name"): next((c.tag for c in case if c.tag in bad), "passed") for case in cases}


def proof(work):
    """What `deftcore gpu-check` printed, or where it was stopped, the verdicts that it had kept by then."""
    kept = (read(work / "cache" / "proved.json") or {}).values()
    so_far = {"kernels": {verdict["kernel"]: verdict for verdict in kept}} if kept else None
    return read(work / "proof.json") or so_far


def report(work):
    """The result file's content. Steps that were stopped for their time have the exit status 124 or 137."""
    lines = (work / "steps").read_text().splitlines()
    steps = {name: {"exit": int(status), "seconds": int(seconds)} for name, status, seconds in map(str.split, lines)}
    sanitizer = steps.get("compute-sanitizer")
    return {
        **(read(work / "machine.json") or {}),
        "steps": steps,
        "proof": proof(work),
        "static": read(work / "static.json"),
        "pytest_exit": steps["tests"]["exit"] if "tests" in steps else None,
        "tests": outcomes(work / "tests.xml"),
        "compute_sanitizer": f"exit {sanitizer['exit']}" if sanitizer else "not run",
        "figures": read(work / "figures.json"),
    }


def failures(result):
    """Names of what did not end well."""
    steps = [f"step {name} (exit {step['exit']})" for name, step in result["steps"].items() if step["exit"]]
    kernels = (result["proof"] or {}).get("kernels", {})
    steps += [f"kernel {name}: {verdict['reason']}" for name, verdict in kernels.items() if verdict["reason"]]
    return steps + [f"{name} {how}" for name, how in result["tests"].items() if how in ("failure", "error")]


def main(work, results):
    result = report(Path(work))
    path = Path(results) / f"{result.get('device', 'unknown').lower().replace(' ', '-')}.json"
    write_json(path, result)
    found = failures(result)
    print(
        f"{path}: {', '.join(result['steps'])}; {len(result['tests'])} tests; failed: {'; '.join(found) or 'nothing'}"
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
