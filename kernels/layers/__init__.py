"""What RWKV-7 computes around its recurrence: by plain torch, by C++ on a CPU and by Triton."""

LAYER_NORM_EPS = 1e-5  # of every released model
