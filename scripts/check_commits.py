# SPDX-License-Identifier: Apache-2.0
"""Commit titles: ``component: Imperative summary``, at most 72 characters.

Checks the commits since the last tag, at most 20. Prints each offender and exits 1; exits 0 where
there is no git history (an unpacked sdist).
"""

from __future__ import annotations

import re
import subprocess
import sys

TITLE = re.compile(r"[a-z][a-z0-9_/.-]*(, [a-z][a-z0-9_/.-]*)*: [A-Z0-9`].*[^.\s]")
LONGEST = 72
MOST_COMMITS = 20


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def titles() -> list[str]:
    try:
        git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return []
    try:
        since = [git("describe", "--tags", "--abbrev=0") + "..HEAD"]
    except subprocess.CalledProcessError:
        since = []
    log = git("log", "--no-merges", f"--max-count={MOST_COMMITS}", "--format=%h %s", *since)
    return log.splitlines()


def main() -> int:
    bad = 0
    for line in titles():
        sha, _, title = line.partition(" ")
        if len(title) > LONGEST:
            print(f"{sha}: {len(title)} characters, at most {LONGEST}: {title}")
            bad += 1
        if not TITLE.fullmatch(title):
            print(f"{sha}: not 'component: Imperative summary': {title}")
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
