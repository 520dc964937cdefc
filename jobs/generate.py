"""The general job, all from flags: `python jobs/generate.py --model M --corpus prompts.jsonl --name NAME`."""

import sys

from hpc import main

if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1].startswith("-"):
        sys.argv.insert(1, "run")
    main()
