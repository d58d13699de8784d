"""What surrounds a run: everything that cannot change a number in it, and the plumbing of what can.

The modules are layered, and each imports from lower layers only (tests/static/test_layers.py):

    0 console       errors, printing, optional packages
    1 ranks files alarms compat verdicts
    2 verifier data rollouts environments
    3 models        a transformers model as the method files use it
    4 adapters offload
    5 vllm_sampler served_teacher
    6 setup memory  from flags to loaded models; the memory that they will need
    7 diagnose retry
    8 run flags     the run folder; the command line

What a method computes stands in its file in methods/. Functions of that file which are needed here
are handed over by name.
"""
