# SPDX-License-Identifier: Apache-2.0
"""``python -m vmth`` is the command ``vmth``."""

from vmth.cli import main

if __name__ == "__main__":
    main()
