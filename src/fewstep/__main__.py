"""``python -m fewstep`` is the command ``fewstep``."""

from __future__ import annotations

from fewstep.cli.app import main

if __name__ == "__main__":
    main()
