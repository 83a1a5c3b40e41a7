"""Settings of all of the tests."""

import os
import sys

# A model of the Hub that isn't here is known to be missing at once, not after the client's retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Tensors are tiny: threads would spend their time waiting for each other, most of all beside other work.
torch.set_num_threads(1)

# rouge_score brings absl, whose log handler closes what stderr was when it was imported: that of a test.
try:
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__
except ImportError:
    pass
