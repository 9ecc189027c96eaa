"""The defaults that options of the command line share with the functions behind the commands.

They stand in a file of their own, because the command line reads them before it imports torch.
"""

MODULE = (
    "transformer"  # the module of an engine that commands look at; an engine of two experts has "transformer_2", too
)
BENCH_CALLS = 10  # how many forwards `turbocompile bench` times
CALIBRATION_CALLS = 8  # how many calls of a model `turbocompile calibrate` keeps
MAX_CALIBRATION_CALLS = 64  # how many it keeps at most, because all are in memory while a layer is measured
EVALUATION_PROMPTS = 200  # how many prompts `turbocompile evaluate` judges
EXAMPLE_VARIANT, EXAMPLE_HEAD_DIM = "t2v", 64  # the pipeline that `turbocompile init-example` writes
SEED = 0  # the seed of noise and of random weights
