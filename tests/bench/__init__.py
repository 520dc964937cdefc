"""`make bench`: this project's engine and its peers on the same requests, on the same machine, in one run.

    python -m tests.bench                      everything, in at most 40 minutes
    python -m tests.bench --quick              a few requests of each workload, one round: does all of it work?
    python -m tests.bench --engines native vllm --workloads W2 --rounds 3
    python -m tests.bench --engines native native:drafts=false      a setting of the job, with and without

workloads.py    the requests, from a fixed seed
weights.py      the model as an unquantized GGUF file; all engines get its weights
engines.py      what there is to run, where each is installed, how it is started
measure.py      what every run_*.py shares: it loads, warms up, measures one window for each workload
run_*.py        one engine each, a process of its own in a virtual environment of its own
schedule.py     the order of the runs, most important first
table.py        medians, paired ratios, agreement of tokens
__main__.py     flags, the loop, the files it leaves in runs/bench/
"""
