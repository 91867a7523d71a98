"""What holds for all tests."""

import torch

# Most tensors here are tiny, and two threads that wait for each other are then several times slower than one.
torch.set_num_threads(1)
