"""The general job, all from flags: `python jobs/generate.py --model M --corpus prompts.jsonl --name NAME`."""

import sys

from hpc import main

if __name__ == "__main__":
    if sys.argv[1:2] not in (["run"], ["status"], ["verify"], ["merge"]):
        sys.argv.insert(1, "run")
    main()
