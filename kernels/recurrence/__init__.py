"""The recurrences of RWKV-4 to 7: the same functions by plain torch, by C++ on a CPU and by Triton."""
