"""Photograph the report of a race for the README: `python docs/screenshot.py [RUN_FOLDER | report.html]`.

Without an argument, the newest report under runs/ is taken. Needs Playwright and a Chromium of the system.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "assets" / "report.png"


def find_report(given: Path | None) -> Path:
    """The report to photograph.

    Raises:
        SystemExit: there is none.
    """
    if given is not None:
        report = given / "report.html" if given.is_dir() else given
        if not report.is_file():
            raise SystemExit(f"{report} is not there. Race first: make race")
        return report
    reports = sorted((ROOT / "runs").glob("*/report.html"), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise SystemExit("runs/ has no report. Race first: make race")
    return reports[-1]


def photograph(report: Path, target: Path, width: int) -> None:
    """Write the report from its top to the end of the first chart to `target` (PNG)."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("STEEPEST_CHROMIUM") or shutil.which("chromium")
    if not program:
        raise SystemExit("No Chromium: install it, or set STEEPEST_CHROMIUM to the program.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 3000})
        page.goto(report.resolve().as_uri())
        chart = page.locator(".js-plotly-plot .main-svg").first
        chart.wait_for()
        box = chart.bounding_box()
        bottom = box["y"] + box["height"] + 24 if box else 1000
        page.screenshot(path=target, animations="disabled", clip={"x": 0, "y": 0, "width": width, "height": bottom})
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, nargs="?", help="a run's folder or a report.html; default: the newest run")
    parser.add_argument("--output", type=Path, default=TARGET)
    parser.add_argument("--width", type=int, default=1100)
    arguments = parser.parse_args()
    report = find_report(arguments.report)
    photograph(report, arguments.output, arguments.width)
    print(f"{report} -> {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
