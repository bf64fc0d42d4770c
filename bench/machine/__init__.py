"""The machine that measures: what it is, what would spoil a measurement, processes on it.

`environment` says what machine and software this is; `nvml` and `proc` read what the driver
and the kernel say, `visible_gpus` and `gpu_lock` say which GPUs a run may use; `checkup` and
`checkup_gpu` give advice; `process` and `workers` run functions in processes of their own.
"""
