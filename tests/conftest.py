"""Settings of all of the tests."""

import torch

# Tensors are tiny: threads would spend their time waiting for each other, most of all beside other work.
torch.set_num_threads(1)
