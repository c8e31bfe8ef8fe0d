"""Settings of the whole test run."""

import torch

# Tiny models: a second thread costs more in waiting than it computes, most of all on a machine that others use too.
torch.set_num_threads(1)
