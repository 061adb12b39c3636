"""Every test process computes on one core: there are as many of them as cores, and threads that wait for each other on
cores that others compute on make small products ten times slower. Set before torch is imported, and inherited by the
commands that tests run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
