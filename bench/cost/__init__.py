"""The verb `cost`: what calls of the operator cost on a GPU that is absent.

`costs` gathers bytes and machine code from `compiled`; `predict_time` makes a time of them with the
figures of `gpu_figures`, for the fused kernels (`launch_work`, `predictions`) and for what eager
and torch.compile launch (`eager_chain`); `host_time` measures the host's part with `idle_driver`.
"""
